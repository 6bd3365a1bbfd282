"""The precision of float32 convolutions, said where they run instead of by whoever last set a global flag.

cuDNN rounds the operands of float32 convolutions to TF32 unless told not to: a relative error of 5e-4 an operand. That is
fine for the networks when asked for, and never for the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch

_PER_OPERATOR = hasattr(torch.backends.cudnn, "conv")  # torch ≥ 2.9: a flag for each backend and kind of operator


def _convolutions() -> list[tuple[ModuleType, str, tuple[object, object]]]:
    """The flags that decide, and their values for float32 and for TF32."""
    if _PER_OPERATOR:
        return [(module.conv, "fp32_precision", ("ieee", "tf32")) for module in (torch.backends.cudnn, torch.backends.mkldnn)]
    return [(torch.backends.cudnn, "allow_tf32", (False, True))]


_FLAGS = _convolutions()


@contextlib.contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Float32 convolutions inside are TF32 for precision "tf32" and true float32 otherwise; the flags are put back."""
    before = [getattr(module, name) for module, name, _ in _FLAGS]
    for module, name, values in _FLAGS:
        setattr(module, name, values[precision == "tf32"])
    try:
        yield
    finally:
        for (module, name, _), value in zip(_FLAGS, before):
            setattr(module, name, value)


def convolutions_are_rounded() -> bool:
    """Whether the global flags let cuDNN round the operands of a float32 convolution to TF32, as they do by default."""
    module, name, (_, rounded) = _FLAGS[0]
    return getattr(module, name) == rounded


def products_are_rounded(device_type: str) -> bool:
    """Whether the global flags let PyTorch round the operands of a float32 matrix product to TF32 or bfloat16."""
    if not _PER_OPERATOR:
        return torch.get_float32_matmul_precision() != "highest"
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("none", "ieee")


# torch.compile calls it instead of tracing it, and recompiles when those flags change. The mark is what
# torch.compiler.assume_constant_result leaves, which would import the compiler to do so.
products_are_rounded._dynamo_marked_constant = True
