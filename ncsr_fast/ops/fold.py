"""Actnorms and 1×1 convolutions folded into affine maps of a pixel, for all steps of a level at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.ops.backend import covering_backend, kernels, resolve_backend
from ncsr_fast.ops.contract import check_matrices, check_tensors
from ncsr_fast.ops.operator import Operator, Tensors
from ncsr_fast.ops.reference import fold_forward
from ncsr_fast.ops.registration import Signature

Maps = tuple[Tensor, Tensor, Tensor]
# Up to so many channels the kernel inverts faster than LAPACK. Milliseconds of kernel and LAPACK (2 cores, AVX-512): 18 maps of
# 96 channels 3.0 and 3.5, their gradient 5.2 and 6.8; 22 maps of 192 channels 30 and 18, their gradient 46 and 31.
_WIDEST_INVERSE = 96


def fold(
    bias: Tensor, logs: Tensor, weight: Tensor, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Actnorms and 1×1 convolutions as affine maps `y = mix · x + offset` of a pixel, or the inverses of these maps.

    `mix = weight · diag(exp(logs))` and `offset = mix · bias`; for the inverse, `mix = diag(exp(-logs)) · weight⁻¹` and `offset
    = -bias`. The maps are computed in float64 whatever the dtype, and are differentiable with respect to every tensor.

    Args:
        bias: (N, C).
        logs: (N, C).
        weight: (N, C, C), rows are output channels.
        inverse: Return the inverse maps.
        backend: "auto", "reference", or "native" for CPU tensors.

    Returns:
        mix (N, C, C), offset (N, C) and the log-det (N,) for one pixel, ±(Σ logs + log|det weight|), all float64.

    Raises:
        ValueError: On the CPU, `inverse` with a matrix that has no inverse. On a GPU the result is NaN instead.
        ValueError, TypeError: A wrong shape, dtype or device; the message names the argument.

    Example:
        >>> mix, offset, logdet = ops.fold(torch.zeros(18, 12), torch.zeros(18, 12), torch.eye(12).expand(18, 12, 12))
    """
    count, channels = check_matrices("fold", weight)
    check_tensors("fold", weight, ("bias", bias, (count, channels)), ("logs", logs, (count, channels)))
    resolve_backend("fold", backend, weight)
    return folded(bias, logs, weight, inverse, "fold: matrix {}", backend)


def folded(bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, name: str, backend: str) -> Maps:
    """`fold` of checked arguments, by the reference if the backend has no kernel or, with "auto", a slower one.

    Args:
        bias: (N, C).
        logs: (N, C).
        weight: (N, C, C).
        inverse: Return the inverse maps.
        backend: "auto", or a backend by name.
        name: The name that messages give to a matrix without an inverse; {} becomes its number.
    """
    if backend == "auto" and inverse and weight.shape[-1] > _WIDEST_INVERSE:
        backend = "reference"
    mix, offset, logdet = _fold((bias, logs, weight), inverse, name, covering_backend("fold", backend, weight))
    return mix, offset, logdet


def _forward(tensors: Maps, inverse: bool, name: str, backend: str) -> tuple[Maps, Tensors]:
    return kernels(backend).fold_forward(name, *tensors, inverse, torch.float64), ()


def _backward(grads: Maps, tensors: Maps, _: Tensors, __: object, inverse: bool, name: str, backend: str) -> Maps:
    return kernels(backend).fold_backward(*tensors, inverse, *grads)


def _reference(bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, name: str, _: str) -> Maps:
    return fold_forward(name, bias, logs, weight, inverse, torch.float64)


def _fake(bias: Tensor, logs: Tensor, weight: Tensor, *_: object) -> Maps:
    mix, offset, logdet = (weight.new_empty(tensor.shape, dtype=torch.float64) for tensor in (weight, bias, bias[:, 0]))
    return mix, offset, logdet


_fold = Operator(
    "fold",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature(
        "Tensor bias, Tensor logs, Tensor weight", "bool inverse, str name, str backend", fake=_fake, outputs=3
    ),
)
