"""Calls of the compiled module: outputs are allocated, and tensors passed as `ops.passing` says. Shapes have been checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ncsr_fast import _native as native
from ncsr_fast.layout import empty_channels_last, empty_like
from ncsr_fast.ops import reference
from ncsr_fast.ops.contract import check_conditions, compute_dtype
from ncsr_fast.ops.conv3x3 import ConvolutionMethod
from ncsr_fast.ops.coupled_step import composed_of
from ncsr_fast.ops.network_gradients import Layers, NetworkPass, StepNetwork, data_gradients, weight_gradients
from ncsr_fast.ops.passing import check_writable, dense, image, parameter, per_sample, run, weight_and_strides


def affine_forward(x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    return _elementwise_forward(native.Map.affine, x, h, pass_through, eps, inverse)


def affine_backward(
    dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _elementwise_backward(native.Map.affine, dy, dlogdet, x, h, pass_through, eps, inverse)


def gaussian_split_forward(x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _elementwise_forward(native.Map.gaussian, x, h, x.shape[1] - h.shape[1] // 2, 1.0, inverse)


def gaussian_split_backward(dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _elementwise_backward(native.Map.gaussian, dy, dlogdet, x, h, x.shape[1] - h.shape[1] // 2, 1.0, inverse)


def _elementwise_forward(map: Any, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    y, logdet = empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x))
    run(
        native.elementwise_forward, x, lambda: native.elementwise_workspace(x.shape),
        map, x.shape, pass_through, eps, inverse, image(x), image(h), image(y), dense(logdet),
    )  # fmt: skip
    return y, logdet


def _elementwise_backward(
    map: Any, dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    dx, dh = empty_like(x), empty_like(h)
    run(
        native.elementwise_backward, x, lambda: 0, map, x.shape, pass_through, eps, inverse,
        image(dy), per_sample(dlogdet, compute_dtype(x)), image(x), image(h), image(dx), image(dh),
    )  # fmt: skip
    return dx, dh


def flow_step_forward(
    x: Tensor, mix: Tensor, offset: Tensor, h_before: Tensor | None, h_after: Tensor | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    y, logdet = empty_like(x), x.new_empty(x.shape[0], dtype=dtype)
    run(
        native.flow_step_forward, x, lambda: native.flow_step_workspace(x.shape, x.dtype == torch.float64, False),
        x.shape, eps, inverse, image(x), dense(mix, dtype), dense(offset, dtype), image(h_before), image(h_after),
        image(y), dense(logdet),
    )  # fmt: skip
    return y, logdet


def flow_step_backward(
    dy: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    y: Tensor,
    mix: Tensor,
    h_before: Tensor | None,
    h_after: Tensor | None,
    eps: float,
    inverse: bool,
    mix_later: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dtype, channels = compute_dtype(x), x.shape[1]
    dx, dmix, doffset = empty_like(x), x.new_empty((channels, channels), dtype=dtype), x.new_empty(channels, dtype=dtype)
    dh_before = None if h_before is None else empty_like(h_before)
    dh_after = None if h_after is None else empty_like(h_after)
    run(
        native.flow_step_backward, x, lambda: native.flow_step_workspace(x.shape, x.dtype == torch.float64, True),
        x.shape, eps, inverse, image(dy), per_sample(dlogdet, dtype), image(x), image(y), dense(mix, dtype),
        image(h_before), image(h_after), image(dx), dense(dmix), dense(doffset), image(dh_before), image(dh_after),
    )  # fmt: skip
    if mix_later:
        return dx, None, None, dh_before, dh_after
    return dx, dmix.to(mix.dtype), doffset.to(mix.dtype), dh_before, dh_after


def step_network_forward(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
    packed: Sequence[Tensor] = (),
) -> Tensor:
    return _step_network(None, None, z1, pre, w1, w2, b2, w3, b3)


def step_network_layers(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    h1, h2 = (torch.empty_like(pre, memory_format=torch.channels_last) for _ in range(2))
    return h1, h2, _step_network(h1, h2, z1, pre, w1, w2, b2, w3, b3)


def step_network_backward(
    dh: Sequence[Tensor],
    z1: Sequence[Tensor | None],
    pre: Sequence[Tensor],
    hidden: Sequence[tuple[Tensor | None, Tensor]] | None,
    networks: Sequence[StepNetwork],
    dpre: Sequence[Tensor],
    dz1: Sequence[Tensor | None],
    *,
    tf32: bool = False,
    packed: Sequence[Sequence[Tensor]] = (),
) -> list[Layers]:
    """As the reference's, by convolutions that are this backend's where they pay."""
    if hidden is None:
        hidden = [_hidden(own_z1, own_pre, *network) for own_z1, own_pre, network in zip(z1, pre, networks)]
    return data_gradients(dh, pre, hidden, networks, dpre, dz1, ConvolutionMethod(tf32))


def step_network_weights_backward(
    passes: Sequence[NetworkPass], gradients: Sequence[StepNetwork], *, tf32: bool = False
) -> None:
    """Likewise."""
    weight_gradients(passes, gradients, ConvolutionMethod(tf32))


def _hidden(
    z1: Tensor | None, pre: Tensor, w1: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden layers, by the reference where z1 is None: the kernel gains nothing then."""
    if z1 is None:
        return reference.step_network_hidden(z1, pre, w1, w2, b2, w3, b3)
    h1, h2 = (torch.empty_like(pre, memory_format=torch.channels_last) for _ in range(2))
    _step_network(h1, h2, z1, pre, w1, w2, b2, torch.zeros_like(w3[:1]), torch.zeros_like(b3[:1]))  # of h, one channel
    return h1, h2


step_network_coupled = composed_of("native")


def step_network_tails(
    pre: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, *, tf32: bool = False, packed: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    networks = zip(pre.chunk(len(w2), dim=1), w2, b2, w3, b3, strict=True)
    return tuple([_step_network(None, None, None, own, None, *weights) for own, *weights in networks])


def _step_network(
    h1: Tensor | None,
    h2: Tensor | None,
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
) -> Tensor:
    """The output, channels-last; the hidden layers are written to h1 and h2 if given."""
    (batch, width, rows, columns), outputs, dtype = pre.shape, w3.shape[0], pre.dtype
    y = empty_channels_last((batch, outputs, rows, columns), pre)
    sizes = (batch, rows, columns, 0 if z1 is None else z1.shape[1], width, outputs)
    run(
        native.step_network_forward, pre, lambda: 0, sizes, image(z1, dtype), image(pre), dense(w1, dtype),
        dense(w2, dtype), dense(b2, dtype), dense(w3, dtype), dense(b3, dtype), image(h1), image(h2), image(y),
    )  # fmt: skip
    return y


def conv3x3_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    upsample2x: bool = False,
    slope: float = 1.0,
    tf32: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """`conv3x3_forward` of the reference; fastest if x and `out` have the channels of a pixel adjacent."""
    return _conv3x3(x, weight, bias, upsample2x, slope, None, False, out, accumulate)


def conv3x3_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
    *,
    upsample2x: bool = False,
    relu: tuple[Tensor, float] | None = None,
    tf32: bool = False,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if needed[0]:
        relu_output, slope = relu or (None, 1.0)
        dx = _conv3x3(dy, weight, None, upsample2x, slope, relu_output, True, dx, dx is not None)
    if not (needed[1] or needed[2]):
        return dx, None, None
    return dx, *_conv3x3_backward_weight(dy, x, upsample2x, dweight)


def _conv3x3_backward_weight(dy: Tensor, x: Tensor, upsample2x: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias."""
    outputs, inputs = dy.shape[1], x.shape[1]
    dweight, dbias = dy.new_empty((outputs, inputs, 3, 3)) if out is None else out, dy.new_empty(outputs)
    if out is not None:
        check_writable(out, dy.dtype)
        if out.stride()[2:] != (3, 1):
            raise ValueError(f"the gradient of a weight must have dense 3×3, not strides {out.stride()}")
    run(
        native.conv3x3_gradient, dy, lambda: 0, (len(x), *x.shape[2:], *dy.shape[2:], inputs, outputs), upsample2x,
        image(x, dy.dtype), image(dy), *weight_and_strides(dweight, dy.dtype), dense(dbias),
    )  # fmt: skip
    return dweight, dbias


def _conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upsample2x: bool,
    slope: float,
    relu_output: Tensor | None,
    transposed: bool,
    out: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """The convolution of x; with `transposed`, the gradient of a convolution's input from the gradient x of its output."""
    batch, inputs, rows, columns = x.shape
    outputs = weight.shape[1 if transposed else 0]
    if out is None:
        if upsample2x:
            rows, columns = (rows // 2, columns // 2) if transposed else (2 * rows, 2 * columns)
        out = empty_channels_last((batch, outputs, rows, columns), x)
        if accumulate:
            out.zero_()
    else:
        check_writable(out, x.dtype)
    run(
        native.conv3x3_forward, x, lambda: 0, (batch, *x.shape[2:], *out.shape[2:], inputs, outputs), upsample2x, image(x),
        *weight_and_strides(weight, x.dtype, transposed), dense(bias, x.dtype), slope, image(relu_output, x.dtype),
        0 if relu_output is None else relu_output.shape[1], transposed, accumulate, image(out),
    )  # fmt: skip
    return out


def inverse_logdet(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W⁻¹ (N, C, C), log|det W| (N,) and the condition number ‖W‖·‖W⁻¹‖ (N,) in the ∞-norm of float64 W (N, C, C)."""
    count, channels, _ = weight.shape
    inverse = weight.new_empty(weight.shape, dtype=torch.float64)
    logdet, condition = weight.new_empty((2, count), dtype=torch.float64).unbind()
    run(
        native.inverse_logdet, weight, lambda: native.inverse_logdet_workspace(count, channels), count, channels,
        dense(weight, torch.float64), dense(inverse), dense(logdet), dense(condition),
    )  # fmt: skip
    return inverse, logdet, condition


def fold_forward(
    name: str,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    inverse: bool,
    dtype: torch.dtype,
    needs_logdet: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, count = weight.shape[-1], weight.shape[0] if weight.dim() == 3 else 1
    mix, offset = weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(bias.shape, dtype=dtype)
    logdet = weight.new_empty(bias.shape[:-1], dtype=torch.float64)
    conditions = run(
        native.fold_forward, weight, lambda: 0, count, channels, inverse, needs_logdet, parameter(bias, 1),
        parameter(logs, 1), parameter(weight, 2), parameter(mix, 2), parameter(offset, 1),
        parameter(logdet, 0),
    )  # fmt: skip
    if inverse:
        check_conditions(name, conditions, channels)
    return mix, offset, logdet


def fold_backward(
    bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dmix: Tensor, doffset: Tensor, dlogdet: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    channels, count = weight.shape[-1], weight.shape[0] if weight.dim() == 3 else 1
    dbias, dlogs, dweight = (x.new_empty(x.shape, dtype=compute_dtype(x)) for x in (bias, logs, weight))
    run(
        native.fold_backward, weight, lambda: 0, count, channels, inverse, parameter(bias, 1), parameter(logs, 1),
        parameter(weight, 2), parameter(dmix, 2), parameter(doffset, 1), parameter(dlogdet.double(), 0),
        parameter(dbias, 1), parameter(dlogs, 1), parameter(dweight, 2),
    )  # fmt: skip
    return dbias.to(bias.dtype), dlogs.to(logs.dtype), dweight.to(weight.dtype)
