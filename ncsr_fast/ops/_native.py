"""Calls of the compiled module: tensors as addresses and strides, outputs allocated, nothing else.

Shapes have been checked. Every tensor goes through `_read`, `_dense`, `_weight` or `_parameter`, and every output through one
of the `…written` functions: these alone take an address, of what a kernel can read. Any memory layout is right, dtypes are
converted, and a tensor without memory or on another device than the first one raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast import _native as native
from ncsr_fast.layout import empty_like, in_memory
from ncsr_fast.ops._contract import check_conditions, compute_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/tensor.h


class _Passed(NamedTuple):
    """An argument as C++ reads it, and the tensor whose memory it is, alive until the call is over."""

    value: Any
    tensor: Tensor | None


_NO_IMAGE = _Passed((0, 0, 0, 0, 0, 0), None)
_NO_ADDRESS = _Passed(0, None)


def _read(x: Tensor | None, dtype: torch.dtype | None = None) -> _Passed:
    """A tensor (B, C, H, W), read as it lies, in `dtype` where the kernel reads no other."""
    if x is None:
        return _NO_IMAGE
    x = in_memory(x) if dtype is None else in_memory(x).to(dtype)
    return _Passed((_address(x), _DTYPES[x.dtype], *x.stride()), x)


def _written(y: Tensor | None) -> _Passed:
    """A tensor (B, C, H, W), written as it lies."""
    if y is None:
        return _NO_IMAGE
    _check_writable(y)
    return _Passed((_address(y), _DTYPES[y.dtype], *y.stride()), y)


def _dense(x: Tensor | None, dtype: torch.dtype) -> _Passed:
    """A tensor that the kernel reads from the first element to the last."""
    if x is None:
        return _NO_ADDRESS
    x = in_memory(x).to(dtype).contiguous()
    return _Passed(_address(x), x)


def _dense_written(y: Tensor) -> _Passed:
    _check_writable(y)
    if not y.is_contiguous():
        raise ValueError(f"an output of a kernel must be contiguous, not of strides {y.stride()} for shape {tuple(y.shape)}")
    return _Passed(_address(y), y)


def _weight(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> tuple[_Passed, tuple[int, int]]:
    """A weight (outputs, inputs, 3, 3) whose 3×3 are dense, some of the channels of another one included; and its strides."""
    weight = in_memory(weight).to(dtype)
    if weight.stride()[2:] != (3, 1):
        weight = weight.contiguous()
    by_output, by_input = weight.stride()[:2]
    return _Passed(_address(weight), weight), (by_input, by_output) if transposed else (by_output, by_input)


def _weight_written(weight: Tensor) -> tuple[_Passed, tuple[int, int]]:
    _check_writable(weight)
    if weight.stride()[2:] != (3, 1):
        raise ValueError(f"the gradient of a weight must have dense 3×3, not strides {weight.stride()}")
    by_output, by_input = weight.stride()[:2]
    return _Passed(_address(weight), weight), (by_output, by_input)


def _per_sample(x: Tensor, dtype: torch.dtype) -> _Passed:
    """One number a sample, of any stride."""
    x = in_memory(x).to(dtype)
    return _Passed((_address(x), _DTYPES[x.dtype], x.stride(0), 0, 0, 0), x)


def _parameter(x: Tensor) -> _Passed:
    """A matrix or a vector of any strides, in float32 or float64, which is what the folding reads."""
    x = in_memory(x)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return _Passed((_address(x), _DTYPES[x.dtype], x.stride(0) if x.dim() == 2 else 0, x.stride(-1), 0, 0), x)


def _parameter_written(x: Tensor) -> _Passed:
    _dense_written(x)
    return _parameter(x)


def _address(x: Tensor) -> int:
    """Where the values of a tensor that `in_memory` returned begin."""
    if x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"a kernel reads memory of the CPU or of a GPU, and this tensor is on {x.device}")
    return x.data_ptr()


def _check_writable(y: Tensor) -> None:
    if in_memory(y) is not y:
        raise TypeError("a kernel cannot write to a tensor with a negative bit, or to one that is known to be zero")


def _run(call: Callable[..., Any], x: Tensor, workspace: Callable[[], int], *arguments: object) -> None:
    """Calls a compiled function where x is; every tensor among the arguments is a `_Passed`."""
    for argument in arguments:
        if type(argument) is _Passed and argument.tensor is not None and argument.tensor.device != x.device:
            raise ValueError(f"a tensor is on {argument.tensor.device}, but the state is on {x.device}")
    _launch(call, x, workspace, *(argument.value if type(argument) is _Passed else argument for argument in arguments))


def _launch(call: Callable[..., Any], x: Tensor, workspace: Callable[[], int], *values: object) -> None:
    """Run on the CPU with torch's number of threads, or on a GPU, of this ordinal, with torch's current stream there."""
    float64 = x.dtype == torch.float64
    if x.device.type == "cpu":
        call(*values, float64, (0, torch.get_num_threads(), 0, 0))
        return
    memory = torch.empty(workspace(), dtype=torch.uint8, device=x.device)  # of torch's allocator, which minds the stream
    with torch.cuda.device(x.device):
        call(*values, float64, (1, x.device.index, torch.cuda.current_stream(x.device).cuda_stream, _address(memory)))


def _logdet(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=compute_dtype(x), device=x.device)


def affine_fwd(x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return _pointwise_fwd(False, x, h, kept, eps, inverse)


def affine_bwd(
    dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _pointwise_bwd(False, dy, dlogdet, x, h, kept, eps, inverse)


def gaussian_fwd(x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _pointwise_fwd(True, x, h, x.shape[1] - h.shape[1] // 2, 1.0, inverse)


def gaussian_bwd(dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _pointwise_bwd(True, dy, dlogdet, x, h, x.shape[1] - h.shape[1] // 2, 1.0, inverse)


def _pointwise_fwd(gaussian: bool, x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logdet = empty_like(x), _logdet(x)
    _run(
        native.pointwise_forward, x, lambda: native.pointwise_workspace(x.shape),
        gaussian, x.shape, kept, eps, inverse, _read(x), _read(h), _written(y), _dense_written(logdet),
    )  # fmt: skip
    return y, logdet


def _pointwise_bwd(
    gaussian: bool, dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    dx, dh = empty_like(x), empty_like(h)
    _run(
        native.pointwise_backward, x, lambda: 0, gaussian, x.shape, kept, eps, inverse,
        _read(dy), _per_sample(dlogdet, compute_dtype(x)), _read(x), _read(h), _written(dx), _written(dh),
    )  # fmt: skip
    return dx, dh


def step_fwd(
    x: Tensor, mix: Tensor, offset: Tensor, h_pre: Tensor | None, h_post: Tensor | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, logdet, dtype = empty_like(x), _logdet(x), compute_dtype(x)
    _run(
        native.flow_step_forward, x, lambda: native.flow_step_workspace(x.shape, x.dtype == torch.float64, False),
        x.shape, eps, inverse, _read(x), _dense(mix, dtype), _dense(offset, dtype), _read(h_pre), _read(h_post), _written(y),
        _dense_written(logdet),
    )  # fmt: skip
    return y, logdet


def step_bwd(
    dy: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    y: Tensor,
    mix: Tensor,
    h_pre: Tensor | None,
    h_post: Tensor | None,
    eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype, channels = compute_dtype(x), x.shape[1]
    dx, dmix, doffset = empty_like(x), x.new_empty((channels, channels), dtype=dtype), x.new_empty(channels, dtype=dtype)
    dh_pre = None if h_pre is None else empty_like(h_pre)
    dh_post = None if h_post is None else empty_like(h_post)
    _run(
        native.flow_step_backward, x, lambda: native.flow_step_workspace(x.shape, x.dtype == torch.float64, True),
        x.shape, eps, inverse, _read(dy), _per_sample(dlogdet, dtype), _read(x), _read(y), _dense(mix, dtype), _read(h_pre),
        _read(h_post), _written(dx), _dense_written(dmix), _dense_written(doffset), _written(dh_pre), _written(dh_post),
    )  # fmt: skip
    return dx, dmix.to(mix.dtype), doffset.to(mix.dtype), dh_pre, dh_post


def network_fwd(
    x: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    hidden: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A coupling or injector network of CPU tensors: conv3x3(relu(conv1x1(relu(pre + conv3x3(x))))), channels-last.

    x may be None, and w1 then is too. Computed in the dtype of pre, float32 or float64; the weights are those of
    `torch.nn.Conv2d`. To `hidden`, of that dtype, what follows the first and the second relu is written.
    """
    (batch, width, rows, columns), outputs = pre.shape, w3.shape[0]
    h1, h2 = hidden or (None, None)
    y = _channels_last((batch, outputs, rows, columns), pre)
    sizes = (batch, rows, columns, 0 if x is None else x.shape[1], width, outputs)
    weights = [_dense(weight, pre.dtype) for weight in (w1, w2, b2, w3, b3)]
    _run(
        native.network_forward, pre, lambda: 0, sizes, _read(x, pre.dtype), _read(pre), *weights, _written(h1), _written(h2),
        _written(y),
    )  # fmt: skip
    return y


def conv3x3_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    copies: bool = False,
    slope: float = 1.0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """leaky_relu(conv3x3(x, weight) + bias) of CPU tensors, zeros around x; added to what `out` holds with `accumulate`.

    Computed in the dtype of x, float32 or float64, which is that of `out` too. x and out are best with the channels of a pixel
    adjacent, and may be different channels of one tensor. With `copies` it is the convolution of x enlarged to twice its size,
    by 2×2 copies of every pixel.
    """
    return _convolution(x, weight, bias, copies, slope, None, False, out, accumulate)


def conv3x3_bwd_input(
    dy: Tensor,
    weight: Tensor,
    *,
    copies: bool = False,
    gate: Tensor | None = None,
    slope: float = 1.0,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The gradient of x of `conv3x3_fwd` without leaky relu, added to what `out` holds with `accumulate`.

    Where x ends with the channels of `gate`, which a leaky relu of this slope made, of them it is the sum's gradient of what
    was before the leaky relu.
    """
    return _convolution(dy, weight, None, copies, slope, gate, True, out, accumulate)


def conv3x3_bwd_weight(dy: Tensor, x: Tensor, *, copies: bool = False, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias of `conv3x3_fwd` without leaky relu; that of weight is written to `out`, some of the
    inputs of a dense weight, if there is one."""
    outputs, inputs = dy.shape[1], x.shape[1]
    dweight, dbias = dy.new_empty((outputs, inputs, 3, 3)) if out is None else out, dy.new_empty(outputs)
    _run(
        native.convolution_gradient, dy, lambda: 0, (*_sizes(x, dy), inputs, outputs), copies, _read(x, dy.dtype), _read(dy),
        *_weight_written(dweight), _dense_written(dbias),
    )  # fmt: skip
    return dweight, dbias


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    copies: bool,
    slope: float,
    gate: Tensor | None,
    transposed: bool,
    out: Tensor | None,
    accumulate: bool,
) -> Tensor:
    batch, inputs, rows, columns = x.shape
    outputs = weight.shape[1 if transposed else 0]
    if out is None:
        if copies:
            rows, columns = (rows // 2, columns // 2) if transposed else (2 * rows, 2 * columns)
        out = _channels_last((batch, outputs, rows, columns), x)
        if accumulate:
            out.zero_()
    _run(
        native.convolution_forward, x, lambda: 0, (*_sizes(x, out), inputs, outputs), copies, _read(x),
        *_weight(weight, x.dtype, transposed), _dense(bias, x.dtype), slope, _read(gate, x.dtype),
        0 if gate is None else gate.shape[1], transposed, accumulate, _written(out),
    )  # fmt: skip
    return out


def _channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int, int]:
    """Of a convolution: the batch, and the rows and columns of both."""
    return (x.shape[0], *x.shape[2:], *y.shape[2:])


def inverse_logdet(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W⁻¹ (N, C, C), log|det W| (N,) and the condition number ‖W‖·‖W⁻¹‖ (N,) in the ∞-norm of float64 W (N, C, C)."""
    count, channels, _ = weight.shape
    inverse, (logdet, condition) = weight.new_empty(weight.shape), weight.new_empty(2, count).unbind()
    _run(
        native.inverse_logdet, weight, lambda: native.inverse_logdet_workspace(count, channels), count, channels,
        _dense(weight, torch.float64), _dense_written(inverse), _dense_written(logdet), _dense_written(condition),
    )  # fmt: skip
    return inverse, logdet, condition


def fold(
    op: str, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dtype: torch.dtype, with_logdet: bool = True
) -> tuple[Tensor, Tensor, float]:
    """As `ops._fold.fold`, for CPU tensors."""
    channels = weight.shape[0]
    mix, offset = weight.new_empty((channels, channels), dtype=dtype), weight.new_empty(channels, dtype=dtype)
    logdet, condition = _fold_by(
        native.fold_forward, channels, _parameter(bias), _parameter(logs), _parameter(weight), inverse, with_logdet,
        _parameter_written(mix), _parameter_written(offset),
    )  # fmt: skip
    if inverse:
        check_conditions(op, [condition], channels)
    return mix, offset, logdet


def fold_backward(
    bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dmix: Tensor, doffset: Tensor, dlogdet: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops._fold.fold_backward`, for CPU tensors."""
    read = [_parameter(x) for x in (bias, logs, weight)]
    grads = [x.new_empty(x.shape, dtype=compute_dtype(x)) for x in (bias, logs, weight)]
    _fold_by(
        native.fold_backward, weight.shape[0], *read, inverse, _parameter(dmix), _parameter(doffset), float(dlogdet),
        *map(_parameter_written, grads),
    )  # fmt: skip
    dbias, dlogs, dweight = (grad.to(tensor.dtype) for grad, tensor in zip(grads, (bias, logs, weight)))
    return dbias, dlogs, dweight


def _fold_by(call: Callable[..., Any], *arguments: object) -> Any:
    return call(*(argument.value if type(argument) is _Passed else argument for argument in arguments))
