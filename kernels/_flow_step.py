"""Functions that the kernels of a flow step share: its affines, which may be left out, and sizes of blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from ncsr_fast.kernels._common import channel_tile
from ncsr_fast.kernels._elementwise import load_pair, mapped
from ncsr_fast.kernels.affine import affine_map, sigmoid_scale


@triton.jit
def affine_if_any(
    b_x,
    h,
    pixel,
    i_c,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    eps,
    INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The affine of h on tile i_c of the channels, and its log-det terms; x and zeros without h."""
    if h is None:
        return b_x, tl.zeros_like(b_x)
    else:
        return mapped(b_x, h, pixel, i_c, pass_through, channels, eps, affine_map, INVERSE, BLOCK_C, CHANNELS_LAST)


@triton.jit
def after_dx(
    b_dy,
    h,
    pixel,
    i_c,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    eps,
    INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """dw of tile i_c: the gradient of the post-affine with respect to its input."""
    if h is None:
        return b_dy
    else:
        _, b_raw = load_pair(h, pixel, i_c, pass_through, channels, BLOCK_C, CHANNELS_LAST)
        b_s, _ = sigmoid_scale(b_raw, eps)
        return tl.where(channel_tile(i_c, BLOCK_C) >= pass_through, b_dy / b_s if INVERSE else b_dy * b_s, b_dy)


def block(channels: int, most: int) -> int:
    """Channels of a tile: a power of two, and at least the 16 of a product."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def pass_through(channels: int, inverse: bool) -> dict[str, int]:
    """Pass-through channels: of the coupling the first half, of the injector none; the inverse has the coupling last."""
    half = channels // 2
    return {"pass_before": 0 if inverse else half, "pass_after": half if inverse else 0}
