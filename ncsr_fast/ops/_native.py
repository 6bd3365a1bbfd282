"""Calls of the compiled module: tensors as pointers and strides, outputs allocated, nothing else.

The arguments have been checked. Every tensor is read as it lies, whatever its strides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ncsr_fast import _native as native
from ncsr_fast.layout import empty_like
from ncsr_fast.ops._contract import check_weight, compute_dtype

CUDA_MISSING = native.cuda_unavailable()  # why these calls cannot take CUDA tensors, or nothing
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/tensor.h
_NOTHING = (0, 0, 0, 0, 0, 0)


def _tensor(x: Tensor | None) -> tuple[int, ...]:
    return _NOTHING if x is None else (x.data_ptr(), _DTYPES[x.dtype], *x.stride())


def _vector(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0), 0, 0, 0


def _run(call: Callable[..., None], x: Tensor, workspace: Callable[[], int], *arguments: object) -> None:
    """Calls a compiled function where x is: on the CPU with torch's number of threads, or on torch's current stream."""
    float64 = x.dtype == torch.float64
    if x.device.type == "cpu":
        call(*arguments, float64, (0, torch.get_num_threads(), 0, 0))
        return
    memory = torch.empty(workspace(), dtype=torch.uint8, device=x.device)  # of torch's allocator, which minds the stream
    with torch.cuda.device(x.device):
        call(*arguments, float64, (1, 0, torch.cuda.current_stream(x.device).cuda_stream, memory.data_ptr()))


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
        gaussian, x.shape, kept, eps, inverse, _tensor(x), _tensor(h), _tensor(y), logdet.data_ptr(),
    )  # fmt: skip
    return y, logdet


def _pointwise_bwd(
    gaussian: bool, dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    dx, dh = empty_like(x), empty_like(h)
    _run(
        native.pointwise_backward, x, lambda: 0, gaussian, x.shape, kept, eps, inverse,
        _tensor(dy), _vector(dlogdet), _tensor(x), _tensor(h), _tensor(dx), _tensor(dh),
    )  # fmt: skip
    return dx, dh


def step_fwd(
    x: Tensor, mix: Tensor, offset: Tensor, h_pre: Tensor | None, h_post: Tensor | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    y, logdet = empty_like(x), _logdet(x)
    _run(
        native.flow_step_forward, x, lambda: native.flow_step_workspace(x.shape, x.dtype == torch.float64, False),
        x.shape, eps, inverse, _tensor(x), mix.data_ptr(), offset.data_ptr(), _tensor(h_pre), _tensor(h_post), _tensor(y),
        logdet.data_ptr(),
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
    dx, dmix, doffset = empty_like(x), torch.empty_like(mix), mix.new_empty(mix.shape[0])
    dh_pre = None if h_pre is None else empty_like(h_pre)
    dh_post = None if h_post is None else empty_like(h_post)
    _run(
        native.flow_step_backward, x, lambda: native.flow_step_workspace(x.shape, x.dtype == torch.float64, True),
        x.shape, eps, inverse, _tensor(dy), _vector(dlogdet), _tensor(x), _tensor(y), mix.data_ptr(), _tensor(h_pre),
        _tensor(h_post), _tensor(dx), dmix.data_ptr(), doffset.data_ptr(), _tensor(dh_pre), _tensor(dh_post),
    )  # fmt: skip
    return dx, dmix, doffset, dh_pre, dh_post


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

    x may be None, and w1 then is too. x and pre lie as they like, of float32 or float64 as everything else; the weights
    are those of `torch.nn.Conv2d`, dense. To `hidden`, like pre, what follows the first and the second relu is written.
    """
    (batch, width, rows, columns), outputs = pre.shape, w3.shape[0]
    h1, h2 = hidden or (None, None)
    y = torch.empty((batch, outputs, rows, columns), dtype=pre.dtype, memory_format=torch.channels_last)
    weights = [0 if weight is None else weight.data_ptr() for weight in (w1, w2, b2, w3, b3)]
    sizes = (batch, rows, columns, 0 if x is None else x.shape[1], width, outputs)
    _run(native.network_forward, pre, lambda: 0, sizes, _tensor(x), _tensor(pre), weights, _tensor(h1), _tensor(h2), _tensor(y))
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

    All of float32 or all of float64. x and out lie as they like, best with the channels of a pixel adjacent, and may be
    different channels of one tensor; weight (outputs, inputs, 3, 3) is dense but for its first two dimensions, bias is dense.
    With `copies` it is the convolution of x enlarged to twice its size, by 2×2 copies of every pixel.
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
        native.convolution_gradient, dy, lambda: 0, (*_sizes(x, dy), inputs, outputs), copies, _tensor(x), _tensor(dy),
        dweight.data_ptr(), dweight.stride()[:2], dbias.data_ptr(),
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
    outputs, strides = weight.shape[0], weight.stride()[:2]
    if transposed:
        outputs, strides = weight.shape[1], strides[::-1]
    if out is None:
        if copies:
            rows, columns = (rows // 2, columns // 2) if transposed else (2 * rows, 2 * columns)
        out = torch.empty((batch, outputs, rows, columns), dtype=x.dtype, memory_format=torch.channels_last)
        if accumulate:
            out.zero_()
    _run(
        native.convolution_forward, x, lambda: 0, (*_sizes(x, out), inputs, outputs), copies, _tensor(x), weight.data_ptr(),
        strides, 0 if bias is None else bias.data_ptr(), slope, _tensor(gate), 0 if gate is None else gate.shape[1],
        transposed, accumulate, _tensor(out),
    )  # fmt: skip
    return out


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int, int]:
    """Of a convolution: the batch, and the rows and columns of both."""
    return (x.shape[0], *x.shape[2:], *y.shape[2:])


def fold(
    op: str, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dtype: torch.dtype, with_logdet: bool = True
) -> tuple[Tensor, Tensor, float]:
    """As `ops._fold.fold`, for CPU tensors."""
    channels = weight.shape[0]
    mix, offset = weight.new_empty((channels, channels), dtype=dtype), weight.new_empty(channels, dtype=dtype)
    bias, logs, weight = _wide(bias), _wide(logs), _wide(weight)
    logdet, condition = native.fold_forward(
        channels, _parameter(bias), _parameter(logs), _parameter(weight), inverse, with_logdet, _parameter(mix),
        _parameter(offset),
    )  # fmt: skip
    if inverse:
        check_weight(op, condition, channels)
    return mix, offset, logdet


def fold_backward(
    bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dmix: Tensor, doffset: Tensor, dlogdet: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops._fold.fold_backward`, for CPU tensors."""
    values = [_wide(bias), _wide(logs), _wide(weight)]
    grads = [torch.empty(value.shape, dtype=value.dtype) for value in values]
    native.fold_backward(
        weight.shape[0], *map(_parameter, values), inverse, _parameter(dmix), _parameter(doffset), float(dlogdet),
        *map(_parameter, grads),
    )  # fmt: skip
    dbias, dlogs, dweight = (grad.to(tensor.dtype) for grad, tensor in zip(grads, (bias, logs, weight)))
    return dbias, dlogs, dweight


def _wide(x: Tensor) -> Tensor:
    """A parameter in float32 or float64, which is what the folding reads."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _parameter(x: Tensor) -> tuple[int, ...]:
    rows = x.stride(0) if x.dim() == 2 else 0
    return x.data_ptr(), _DTYPES[x.dtype], rows, x.stride(-1), 0, 0
