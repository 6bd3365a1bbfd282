"""Affine injector and coupling, one kernel per direction, for shift, scale and log-det; the network of h is not included."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._elementwise import elementwise_backward, elementwise_forward


@triton.jit
def sigmoid_scale(raw, eps):
    """s = q + eps and q(1 - q) for q = sigmoid(raw + 2); exp(-|raw + 2|) cannot overflow, and 1 - q does not lose digits."""
    t = raw + 2.0
    b_e = tl.exp(-tl.abs(t))
    b_q = tl.where(t >= 0, 1.0, b_e) / (1.0 + b_e)
    return b_q + eps, b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def affine_map(x, shift, raw, eps, INVERSE: tl.constexpr):
    """y = (x + shift)·s with log-det term log s; inverse y = x/s - shift with -log s."""
    s, _ = sigmoid_scale(raw, eps)
    if INVERSE:
        return x / s - shift, -tl.log(s)
    else:
        return (x + shift) * s, tl.log(s)


@triton.jit
def affine_map_gradients(dy, g, v, raw, eps, INVERSE: tl.constexpr):
    """dx, dshift and draw, from the scaled value v = (x + shift)·s, or x/s for the inverse.

    dx = dshift = dy·s, draw = (dy·v + g)/s·q(1-q); inverse dx = dy/s, dshift = -dy, draw = -(dy·v + g)/s·q(1-q).
    """
    s, slope = sigmoid_scale(raw, eps)
    draw = (dy * v + g) / s * slope
    if INVERSE:
        return dy / s, -dy, -draw
    else:
        return dy * s, dy * s, draw


@triton.jit
def affine_map_backward(dy, g, x, shift, raw, eps, INVERSE: tl.constexpr):
    """The gradients from the input: v = (x + shift)·s, or x/s for the inverse."""
    s, _ = sigmoid_scale(raw, eps)
    v = x / s if INVERSE else (x + shift) * s
    return affine_map_gradients(dy, g, v, raw, eps, INVERSE)


def affine_forward(x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet); the first channels are copied, h (B, 2(C - pass_through), H, W) holds shift and raw interleaved."""
    return elementwise_forward(x, h, pass_through, eps, affine_map, inverse)


def affine_backward(
    dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dh) from the inputs of `affine_forward`."""
    return elementwise_backward(dy, dlogdet, x, h, pass_through, eps, affine_map_backward, inverse)
