"""The reference of the kernels in PyTorch: specification of the backends, fallback without a kernel, and test oracle.

    affine           y = (x + t)·s on the channels from `pass_through` on, or y = x/s - t; s = sigmoid(raw + 2) + eps
    gaussian_split   eps = (x - mean)·exp(-logs) on the last channels, or its inverse, and the log-density
    flow_step        y = after(mix·before(x) + offset), with two such affines
    inverse_logdet   W⁻¹, log|det W| and the condition number of W
    fold_filters     weights and biases of convolutions times the scales of their outputs
    fold             actnorm and 1×1 convolution as one affine map y = mix·x + offset of a pixel
    conv3x3          zero-padded 3×3 convolution; options: upsampled input, adding to an output, derivative of a leaky ReLU
    step_network     w3 ∗ relu(w2 · relu(w1 ∗ z1 + pre) + b2) + b3

`ncsr_fast.ops.protocol.Kernels` has their signatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.layout import dense_format, is_channels_last
from ncsr_fast.ops.contract import compute_dtype, pass_through_channels
from ncsr_fast.ops.plain_convolution import Needed, convolve, convolve_backward
from ncsr_fast.ops.plain_dense_blocks import dense_blocks_backward as dense_blocks_backward
from ncsr_fast.ops.plain_dense_blocks import dense_blocks_forward as dense_blocks_forward
from ncsr_fast.ops.plain_fold import fold_backward as fold_backward
from ncsr_fast.ops.plain_fold import fold_filters_backward as fold_filters_backward
from ncsr_fast.ops.plain_fold import fold_filters_forward as fold_filters_forward
from ncsr_fast.ops.plain_fold import fold_forward as fold_forward
from ncsr_fast.ops.plain_inverse import inverse_logdet as inverse_logdet
from ncsr_fast.ops.plain_network import step_network_backward as step_network_backward
from ncsr_fast.ops.plain_network import step_network_coupled as step_network_coupled
from ncsr_fast.ops.plain_network import step_network_forward as step_network_forward
from ncsr_fast.ops.plain_network import step_network_hidden as step_network_hidden
from ncsr_fast.ops.plain_network import step_network_layers as step_network_layers
from ncsr_fast.ops.plain_network import step_network_tails as step_network_tails
from ncsr_fast.ops.plain_network import step_network_weights as step_network_weights
from ncsr_fast.ops.plain_network import step_network_weights_backward as step_network_weights_backward
from ncsr_fast.precision import product


def affine_forward(x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and Σ log|det| (B,)."""
    dtype = compute_dtype(x)
    h = h.to(dtype)
    shift, scale = h[:, 0::2], _affine_scale(h, eps)
    changed = x[:, pass_through:].to(dtype)
    y = changed / scale - shift if inverse else (changed + shift) * scale
    y = torch.cat([x[:, :pass_through], y.to(x.dtype)], dim=1) if pass_through else y.to(x.dtype)
    logdet = torch.log(scale).sum(dim=(1, 2, 3))
    return y, -logdet if inverse else logdet


def affine_logdet(h: Tensor, eps: float) -> Tensor:
    """Σ log|det| (B,) of the affine map, not of its inverse, whose network has the output h: a part of an image's, too."""
    return torch.log(_affine_scale(h, eps)).sum(dim=(1, 2, 3))


def _affine_scale(h: Tensor, eps: float) -> Tensor:
    return torch.sigmoid(h[:, 1::2] + 2) + eps


def affine_backward(
    dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and h, from the input x."""
    return _affine_gradients(dy, dlogdet, affine_forward(x, h, pass_through, eps, inverse)[0], h, pass_through, eps, inverse)


def _affine_gradients(
    dy: Tensor, dlogdet: Tensor, y: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients from the output y: dx = dy·s, ds = (dy·y + g)/s; for the inverse dx = dy/s, ds = -(dx·(y + t) + g/s)."""
    dtype = compute_dtype(y)
    values = h.to(dtype)
    gate, g = torch.sigmoid(values[:, 1::2] + 2), dlogdet[:, None, None, None]
    scale = gate + eps
    changed, dchanged = y[:, pass_through:].to(dtype), dy[:, pass_through:].to(dtype)
    if inverse:
        dchanged = dchanged / scale
        dshift, dscale = -dy[:, pass_through:].to(dtype), -(dchanged * (changed + values[:, 0::2]) + g / scale)
    else:
        dscale = (dchanged * changed + g) / scale
        dchanged = dchanged * scale
        dshift = dchanged
    dh = torch.stack([dshift, dscale * gate * (1 - gate)], dim=2).flatten(1, 2)
    dx = torch.cat([dy[:, :pass_through], dchanged.to(dy.dtype)], dim=1) if pass_through else dchanged.to(dy.dtype)
    return dx, dh.to(h.dtype)


def gaussian_log_density(eps: Tensor) -> Tensor:
    """log N(eps; 0, 1) of every element, in nats."""
    return -0.5 * (eps * eps + math.log(2 * math.pi))


def gaussian_split_forward(x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the log-density (B,) of the last channels, the negative of it for the inverse."""
    taken, dtype = h.shape[1] // 2, compute_dtype(x)
    mean, logs = h[:, 0::2].to(dtype), h[:, 1::2].to(dtype)
    z1, last = x[:, :-taken], x[:, -taken:].to(dtype)
    eps = last if inverse else (last - mean) * torch.exp(-logs)
    logdet = (gaussian_log_density(eps) - logs).sum(dim=(1, 2, 3))
    changed = mean + torch.exp(logs) * eps if inverse else eps
    return torch.cat([z1, changed.to(x.dtype)], dim=1), -logdet if inverse else logdet


def gaussian_split_backward(dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and h.

    With d = dy - g·eps: dx = d·exp(-logs), dmean = -dx, dlogs = -d·eps - g. For the inverse, whose x is eps:
    dx = dy·exp(logs) + g·x, dmean = dy, dlogs = dy·exp(logs)·x + g.
    """
    taken, dtype, g = h.shape[1] // 2, compute_dtype(x), dlogdet[:, None, None, None]
    mean, logs = h[:, 0::2].to(dtype), h[:, 1::2].to(dtype)
    last, dlast = x[:, -taken:].to(dtype), dy[:, -taken:].to(dtype)
    if inverse:
        scaled = dlast * torch.exp(logs)
        dchanged, dmean, dlogs = scaled + g * last, dlast, scaled * last + g
    else:
        eps = (last - mean) * torch.exp(-logs)
        d = dlast - g * eps
        dchanged = d * torch.exp(-logs)
        dmean, dlogs = -dchanged, -d * eps - g
    dh = torch.stack([dmean, dlogs], dim=2).flatten(1, 2).to(h.dtype)
    return torch.cat([dy[:, :-taken], dchanged.to(dy.dtype)], dim=1), dh


def flow_step_forward(
    x: Tensor, mix: Tensor, offset: Tensor, h_before: Tensor | None, h_after: Tensor | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the log|det| (B,) of the affines. Encoding, `before` is a coupling; decoding, `after`."""
    pass_before, pass_after = _pass_through(x, inverse)
    y, logdet = x.to(mix.dtype), x.new_zeros(x.shape[0], dtype=compute_dtype(x))
    if h_before is not None:
        y, part = affine_forward(y, h_before, pass_before, eps, inverse)
        logdet = logdet + part
    y = mixed(mix, y) + offset[:, None, None]
    if h_after is not None:
        y, part = affine_forward(y, h_after, pass_after, eps, inverse)
        logdet = logdet + part
    return y.to(x.dtype), logdet


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
    """Gradients of x, mix, offset, h_before and h_after, from the input x and the output y.

    With `mix_later` None for mix and offset, which are left to `flow_step_mix_backward`.
    """
    pass_before, pass_after = _pass_through(x, inverse)
    dh_before = dh_after = dmix = doffset = None
    dw = dy.to(mix.dtype)
    if h_after is not None:
        dw, dh_after = _affine_gradients(dw, dlogdet, y.to(mix.dtype), h_after, pass_after, eps, inverse)
    a = x.to(mix.dtype)
    if h_before is not None:
        a, _ = affine_forward(a, h_before, pass_before, eps, inverse)
    if not mix_later:
        dmix, doffset = _mix_gradients(dw, a)
    dx = mixed(mix.mT, dw)
    if h_before is not None:
        dx, dh_before = _affine_gradients(dx, dlogdet, a, h_before, pass_before, eps, inverse)
    return dx.to(x.dtype), dmix, doffset, dh_before, dh_after


def flow_step_mix_backward(
    steps: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the matrices (n, C, C) and offsets (n, C) of n steps, from dy, x, h_before and h_after of each."""
    found = []
    for dy, x, h_before, h_after in steps:
        (pass_before, pass_after), dtype = _pass_through(x, inverse), compute_dtype(x)
        dw, a = dy.to(dtype), x.to(dtype)
        if h_after is not None:
            scale = torch.sigmoid(h_after[:, 1::2].to(dtype) + 2) + eps
            changed = dw[:, pass_after:] / scale if inverse else dw[:, pass_after:] * scale
            dw = torch.cat([dw[:, :pass_after], changed], dim=1)
        if h_before is not None:
            a, _ = affine_forward(a, h_before, pass_before, eps, inverse)
        found.append(_mix_gradients(dw, a))
    dmix, doffset = map(torch.stack, zip(*found))
    return dmix, doffset


def _mix_gradients(dw: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Of w = mix·a + offset."""
    pixels = dw.flatten(2)
    return product(pixels, a.flatten(2).mT).sum(dim=0), pixels.sum(dim=(0, 2))


def mixed(mix: Tensor, x: Tensor) -> Tensor:
    """mix·x at every pixel of x (B, C, H, W), in the layout of x."""
    if is_channels_last(x):
        return product(x.movedim(1, 3), mix.mT).movedim(3, 1)
    return product(mix, x.flatten(2)).view(x.shape)


def _pass_through(x: Tensor, inverse: bool) -> tuple[int, int]:
    """Pass-through channels of the affine before the matrix and of the one after it."""
    half = pass_through_channels(x.shape[1])
    return (0, half) if inverse else (half, 0)


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
    """leaky_relu(weight ∗ x + bias) with zero padding, in the dtype of x.

    Args:
        x: (B, C, H, W).
        upsample2x: Read x as upsampled ×2 by nearest neighbour.
        weight: (N, C, 3, 3).
        bias: (N,) or None.
        slope: Slope of the leaky ReLU; 1: no leaky ReLU.
        tf32: Permit a GPU to round float32 operands to TF32.
        out: Output that is written to and returned, if given; may be other channels of the memory of x.
        accumulate: Add to `out` instead of overwriting it.
    """
    y = convolve(_upsampled(x) if upsample2x else x, weight, bias, tf32)
    if slope != 1 and out is not None and not accumulate:
        torch.ops.aten.leaky_relu.out(y, slope, out=out)
        return out
    y = y if slope == 1 else F.leaky_relu(y, slope)
    if out is None:
        return y
    return out.add_(y) if accumulate else out.copy_(y)


def conv3x3_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: Needed,
    *,
    upsample2x: bool = False,
    relu: tuple[Tensor, float] | None = None,
    tf32: bool = False,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The `needed` gradients of x, weight and bias of `conv3x3_forward` without its leaky ReLU.

    They are in the dtype of x; the gradients of weight and bias may be in the dtype in which a backend sums.

    Args:
        dy: Gradient of the output.
        x: (B, C, H, W); with `upsample2x` its gradient sums the 2×2 upsampled pixels of each pixel.
        weight: (N, C, 3, 3).
        needed: Flags of the three gradients.
        upsample2x: As in the forward pass.
        relu: Output of a leaky ReLU, the trailing channels of x, and its slope. For these channels the gradient, added to
            `dx`, is multiplied by the derivative of the leaky ReLU: 1 where its output is positive, else the slope.
        tf32: Permit a GPU to round float32 operands to TF32.
        dx: Gradient that is added to and returned, if given.
        dweight: Gradient that is written to and returned, if given; may be a slice of the inputs of a dense tensor.
    """
    read = _upsampled(x) if upsample2x else x
    found, dfound, dbias = convolve_backward(dy, read, weight, needed, tf32)
    if found is not None:
        found = F.avg_pool2d(found, 2, divisor_override=1) if upsample2x else found
        dx = found if dx is None else dx.add_(found)
        if relu is not None:
            last = dx[:, -relu[0].shape[1] :]
            torch.ops.aten.leaky_relu_backward.grad_input(last, *relu, True, grad_input=last)
    return dx, dfound if dweight is None or dfound is None else dweight.copy_(dfound), dbias


def conv3x3_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in the layout that the backend reads best, for convolutions in this dtype; here unchanged."""
    return [*weights]


def _upsampled(x: Tensor, factor: int = 2) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="nearest")


def hoisted_forward(
    own: Tensor, stacked: Tensor, weight: Tensor, bias: Tensor, *, groups: int = 1, tf32: bool = False
) -> list[Tensor]:
    """weight ∗ [own, stacked upsampled by nearest neighbour] + bias, in the dtype and layout of `own`.

    Args:
        own: (B, c, f·H, f·W), f a whole number.
        stacked: (B, s, H, W).
        weight: (N, c + s, 3, 3).
        bias: (N,).
        groups: Number of dense images that the outputs are in.
        tf32: Permit a GPU to round float32 operands to TF32.

    Returns:
        The images (B, N / groups, f·H, f·W).
    """
    y, layout = convolve(_joined(own, stacked), weight, bias, tf32), dense_format(own)
    return [image.contiguous(memory_format=layout) for image in y.chunk(groups, dim=1)]


def hoisted_backward(
    dy: Tensor, own: Tensor, stacked: Tensor, weight: Tensor, needed: Needed, *, tf32: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of own, stacked, weight and bias of `hoisted_forward`, from that of its only image.

    In the dtype of own; those of weight and bias, of which both are needed or none, may be in the one in which a backend sums.
    """
    wanted = needed[0] or needed[1], needed[2], needed[2]
    joined, dweight, dbias = convolve_backward(dy, _joined(own, stacked), weight, wanted, tf32)
    if joined is None:
        return None, None, dweight, dbias
    down, dlarge = joined.tensor_split([own.shape[1]], dim=1)
    return down, F.avg_pool2d(dlarge, own.shape[2] // stacked.shape[2], divisor_override=1), dweight, dbias


def _joined(own: Tensor, stacked: Tensor) -> Tensor:
    return torch.cat([own, _upsampled(stacked, own.shape[2] // stacked.shape[2])], dim=1)
