"""How tensors are passed to the compiled module: as addresses and strides.

`image`, `dense`, `weight_and_strides`, `per_sample` and `parameter` say how a kernel reads or writes a tensor; only `run` takes
addresses. Every memory layout is supported, dtypes are converted, and a tensor without memory, or on another device than the
first tensor, raises an error. `check_writable` checks the caller's tensors that a kernel writes to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.layout import in_memory, writable

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/core/tensor.h


class Passed(NamedTuple):
    """A tensor whose memory a kernel reads or writes; its address is null without a tensor.

    Args:
        tensor: The tensor, referenced until the call is over.
        layout: Dtype and strides, which C++ reads after the address; None: the address alone.
    """

    tensor: Tensor | None
    layout: tuple[int, ...] | None


_NO_IMAGE = Passed(None, (0, 0, 0, 0, 0))
_NO_ADDRESS = Passed(None, None)


def image(x: Tensor | None, dtype: torch.dtype | None = None) -> Passed:
    """A tensor (B, C, H, W) in its own layout; converted to `dtype` if given."""
    if x is None:
        return _NO_IMAGE
    x = in_memory(x) if dtype is None else in_memory(x).to(dtype)
    return Passed(x, (_DTYPES[x.dtype], *x.stride()))


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Passed:
    """A contiguous tensor; converted to `dtype` if given."""
    return _NO_ADDRESS if x is None else Passed(in_memory(x).to(dtype or x.dtype).contiguous(), None)


def weight_and_strides(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> tuple[Passed, tuple[int, int]]:
    """A weight (outputs, inputs, 3, 3) with dense 3×3, possibly a slice of the channels of another weight; and its strides."""
    weight = in_memory(weight).to(dtype)
    if weight.stride()[2:] != (3, 1):
        weight = weight.contiguous()
    by_output, by_input = weight.stride()[:2]
    return Passed(weight, None), (by_input, by_output) if transposed else (by_output, by_input)


def per_sample(x: Tensor, dtype: torch.dtype) -> Passed:
    """One number per sample, with any stride."""
    x = in_memory(x).to(dtype)
    return Passed(x, (_DTYPES[x.dtype], x.stride(0), 0, 0, 0))


def parameter(x: Tensor, dims: int) -> Passed:
    """A tensor of `dims` ≤ 2 dimensions, or a stack of such tensors, with any strides and dtype, for the folding."""
    x = in_memory(x)
    strides = x.stride()
    item = strides[0] if len(strides) > dims else 0
    row, column = (0, 0, *strides)[-2:] if dims == 2 else (0, strides[-1] if dims else 0)
    return Passed(x, (_DTYPES[x.dtype], item, 0, row, column))


def check_writable(y: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError for a tensor of another dtype than the kernel writes, or one that cannot be written to."""
    if writable(y).dtype != dtype:
        raise TypeError(f"the kernel writes {dtype} here, but this tensor is {y.dtype}")


def run(call: Callable[..., Any], x: Tensor, workspace: Callable[[], int], *arguments: object) -> Any:
    """Call a compiled function on the device of x, on which every tensor must be."""
    device, values = x.device, []
    for argument in arguments:
        if type(argument) is not Passed:
            values.append(argument)
            continue
        tensor, layout = argument
        address = 0
        if tensor is not None:
            if not (tensor.is_cpu or tensor.is_cuda):
                raise TypeError(f"a kernel reads memory of the CPU or of a GPU, but this tensor is on {tensor.device}")
            if tensor.device != device:
                raise ValueError(f"a tensor is on {tensor.device}, but the state is on {device}")
            address = tensor.data_ptr()
        values.append(address if layout is None else (address, *layout))
    return _launch(call, x, workspace, *values)


def _launch(call: Callable[..., Any], x: Tensor, workspace: Callable[[], int], *values: object) -> Any:
    """Run on the CPU with torch's number of threads, or on a GPU with its ordinal and torch's current stream there."""
    float64, device = x.dtype == torch.float64, x.device
    if device.type == "cpu":
        return call(*values, float64, (0, torch.get_num_threads(), 0, 0))
    memory = torch.empty(workspace(), dtype=torch.uint8, device=device)  # from torch's allocator, which is aware of streams
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        return call(*values, float64, (1, device.index, stream, memory.data_ptr()))
