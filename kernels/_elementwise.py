"""The elementwise maps y2 = map(x2; h): a pair of numbers changes each of the last channels; the first ones pass through.

All such maps share one pair of kernels. The map itself, on blocks of float32, is a constexpr argument:
`MAP(x, first, second, constant, INVERSE) -> (y, logdet term)` and
`MAP(dy, g, x, first, second, constant, INVERSE) -> (dx, dfirst, dsecond)` for the backward kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import (
    channel_tile,
    check_dtype,
    extent,
    image,
    launch,
    load,
    per_sample,
    pixel_tile,
    program,
    store,
    sum_partials,
    tuned,
)
from ncsr_fast.layout import empty_like

# Elements of a tile, 4 a thread. Chosen for registers and occupancy by the ahead-of-time report
# (ncsr_fast.kernels.ahead_of_time), never timed: no GPU yet.
SIZES = {"TILE": 512, "num_warps": 4}
CHANNELS_OF_A_PIXEL = 64  # most channels of a channels-last tile: 256 bytes of float32
CHANNELS_OF_A_ROW = 4  # most channels of another tile, which then has rows of 128 pixels


@triton.jit
def load_pair(
    h, pixel, i_c, pass_through: tl.constexpr, channels: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """The pairs for tile i_c of the channels of x: channels i = 2(c - pass_through) and i + 1 of h."""
    if CHANNELS_LAST:  # both numbers at once, so that lanes read adjacent numbers
        o = channel_tile(i_c, 2 * BLOCK_C) - 2 * pass_through
        b = load(h, pixel, o, (o >= 0) & (o < 2 * (channels - pass_through)))
        return tl.split(tl.reshape(b, [b.shape[0], BLOCK_C, 2]))
    else:
        o = channel_tile(i_c, BLOCK_C) - pass_through
        m = (o >= 0) & (o < channels - pass_through)
        return load(h, pixel, 2 * o, m), load(h, pixel, 2 * o + 1, m)


@triton.jit
def store_pair(
    h,
    pixel,
    i_c,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    b_first,
    b_second,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The inverse of `load_pair`."""
    if CHANNELS_LAST:
        o = channel_tile(i_c, 2 * BLOCK_C) - 2 * pass_through
        store(h, pixel, o, tl.interleave(b_first, b_second), (o >= 0) & (o < 2 * (channels - pass_through)))
    else:
        o = channel_tile(i_c, BLOCK_C) - pass_through
        m = (o >= 0) & (o < channels - pass_through)
        store(h, pixel, 2 * o, b_first, m)
        store(h, pixel, 2 * o + 1, b_second, m)


@triton.jit
def mapped(
    b_x,
    h,
    pixel,
    i_c,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    constant,
    MAP: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Tile i_c of the channels of x after the map, and the log-det terms: x itself and zeros in pass-through channels."""
    o_c = channel_tile(i_c, BLOCK_C)
    m_changed = (o_c >= pass_through) & (o_c < channels)
    b_first, b_second = load_pair(h, pixel, i_c, pass_through, channels, BLOCK_C, CHANNELS_LAST)
    b_y, b_logdet = MAP(b_x, b_first, b_second, constant, INVERSE)
    return tl.where(m_changed, b_y, b_x), tl.where(pixel[3] & m_changed, b_logdet, 0.0)


@triton.jit
def mapped_backward(
    b_dy,
    b_g,
    b_x,
    h,
    dh,
    pixel,
    i_c,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    constant,
    MAP: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Tile i_c of the channels of dx, dy itself in pass-through channels; stores dh."""
    b_first, b_second = load_pair(h, pixel, i_c, pass_through, channels, BLOCK_C, CHANNELS_LAST)
    b_dx, b_dfirst, b_dsecond = MAP(b_dy, b_g, b_x, b_first, b_second, constant, INVERSE)
    store_pair(dh, pixel, i_c, pass_through, channels, b_dfirst, b_dsecond, BLOCK_C, CHANNELS_LAST)
    return tl.where(channel_tile(i_c, BLOCK_C) >= pass_through, b_dx, b_dy)


@triton.jit(do_not_specialize=["pixels", "width"])
def elementwise_forward_kernel(
    x,  # (B, C, H, W)
    h,  # (B, 2(C - pass_through), H, W)
    y,  # (B, C, H, W)
    p_partial,  # (programs,), B times the tiles of a sample
    pass_through: tl.constexpr,
    constant,
    channels: tl.constexpr,
    pixels,
    width,
    MAP: tl.constexpr,
    INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = (x1, map(x2; h)) and this tile's share of the log-det, Σ of the map's terms."""
    i_b, i_p, i_c = program(tl.cdiv(pixels, BLOCK_P), tl.cdiv(channels, BLOCK_C))
    pixel = pixel_tile(i_b, i_p, pixels, width, UNIT, BLOCK_P)
    o_c = channel_tile(i_c, BLOCK_C)
    b_x = load(x, pixel, o_c, o_c < channels)
    b_y, b_logdet = mapped(b_x, h, pixel, i_c, pass_through, channels, constant, MAP, INVERSE, BLOCK_C, CHANNELS_LAST)
    store(y, pixel, o_c, b_y, o_c < channels)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_logdet))


@triton.jit(do_not_specialize=["pixels", "width"])
def elementwise_backward_kernel(
    dy,  # (B, C, H, W)
    dlogdet,  # (B,)
    x,  # (B, C, H, W)
    h,  # (B, 2(C - pass_through), H, W)
    dx,  # (B, C, H, W)
    dh,  # (B, 2(C - pass_through), H, W)
    pass_through: tl.constexpr,
    constant,
    channels: tl.constexpr,
    pixels,
    width,
    MAP: tl.constexpr,
    INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = (dy1, dy2·∂y2/∂x2 + g·∂logdet/∂x2), dh = dy2·∂y2/∂h + g·∂logdet/∂h; g is dlogdet of the sample."""
    i_b, i_p, i_c = program(tl.cdiv(pixels, BLOCK_P), tl.cdiv(channels, BLOCK_C))
    pixel = pixel_tile(i_b, i_p, pixels, width, UNIT, BLOCK_P)
    o_c = channel_tile(i_c, BLOCK_C)
    b_dy = load(dy, pixel, o_c, o_c < channels)
    b_x = load(x, pixel, o_c, o_c < channels)
    b_g = tl.load(dlogdet[0] + i_b * dlogdet[1]).to(tl.float32)
    b_dx = mapped_backward(
        b_dy, b_g, b_x, h, dh, pixel, i_c, pass_through, channels, constant, MAP, INVERSE, BLOCK_C, CHANNELS_LAST
    )
    store(dx, pixel, o_c, b_dx, o_c < channels)


def _tiles(
    device: torch.device, kernel: str, channels: int, pixels: int, CHANNELS_LAST: bool, **_
) -> tuple[int, dict[str, int]]:
    """The number of tiles of a sample, and the sizes of a tile."""
    sizes = tuned(device, kernel, channels, SIZES)
    block_c = min(CHANNELS_OF_A_PIXEL if CHANNELS_LAST else CHANNELS_OF_A_ROW, triton.next_power_of_2(channels))
    block_p = sizes["TILE"] // block_c
    count = triton.cdiv(pixels, block_p) * triton.cdiv(channels, block_c)
    return count, {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": sizes["num_warps"]}


def elementwise_forward(
    x: Tensor, h: Tensor, pass_through: int, constant: float, map_forward, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: (y, logdet)."""
    check_dtype(x)
    y, logdet = empty_like(x), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, logdet.zero_()
    sizes = extent(x, h, y)
    count, blocks = _tiles(x.device, "elementwise_forward", **sizes)
    partial = torch.empty(x.shape[0], count, dtype=torch.float32, device=x.device)
    launch(
        elementwise_forward_kernel,
        partial.numel(),
        x.device,
        x=image(x),
        h=image(h),
        y=image(y),
        p_partial=partial,
        pass_through=pass_through,
        constant=constant,
        MAP=map_forward,
        INVERSE=inverse,
        **sizes,
        **blocks,
    )
    sum_partials(partial, 1, logdet)
    return y, logdet


def elementwise_backward(
    dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, pass_through: int, constant: float, map_backward, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dx, dh)."""
    check_dtype(x)
    dx, dh = empty_like(x), empty_like(h)
    if x.numel() == 0:
        return dx, dh
    sizes = extent(x, dy, h, dx, dh)
    count, blocks = _tiles(x.device, "elementwise_backward", **sizes)
    launch(
        elementwise_backward_kernel,
        x.shape[0] * count,
        x.device,
        dy=image(dy),
        dlogdet=per_sample(dlogdet),
        x=image(x),
        h=image(h),
        dx=image(dx),
        dh=image(dh),
        pass_through=pass_through,
        constant=constant,
        MAP=map_backward,
        INVERSE=inverse,
        **sizes,
        **blocks,
    )
    return dx, dh
