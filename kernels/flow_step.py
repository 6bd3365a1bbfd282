"""The maps between two coupling networks, fused: affine, C×C mix of the channels of a pixel, affine, and the log-dets.

The networks are not included, nor is the log-det of the mix, which is the same at every pixel. Either affine may be left out.
The product is in true float32, never TF32, which would raise the round-trip error of a level from 1e-6 to 2e-3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import (
    channel_tile,
    check_dtype,
    dense,
    extent,
    image,
    launch,
    load,
    matrix,
    per_sample,
    pixel_tile,
    program,
    store,
    sum_partials,
    tuned,
)
from ncsr_fast.kernels._elementwise import load_pair, mapped_backward, store_pair
from ncsr_fast.kernels._flow_step import affine_if_any, after_dx, block, pass_through
from ncsr_fast.kernels._flow_step_mix import flow_step_mix_backward
from ncsr_fast.kernels.affine import affine_map_backward, affine_map_gradients
from ncsr_fast.layout import empty_like

# Sizes of the tiles of the three products. Chosen for registers, spills and shared memory by the ahead-of-time
# report (ncsr_fast.kernels.ahead_of_time), never timed: no GPU yet.
CHANNELS = 64  # at most, written by a program
# Of a program of the forward and backward kernels, by the channels it writes; BLOCK_K: channels read at once, or 16 where that
# would leave a remainder. Unless told how many registers a thread may have, ptxas spills a few bytes to fit another program.
OPTIONS = {
    16: {"BLOCK_P": 64, "BLOCK_K": 16, "num_warps": 4, "maxnreg": 128},
    32: {"BLOCK_P": 32, "BLOCK_K": 32, "num_warps": 4, "maxnreg": 168},
    64: {"BLOCK_P": 32, "BLOCK_K": 32, "num_warps": 8, "maxnreg": 128},
}
BACKWARD_OPTIONS = {**OPTIONS, 64: {**OPTIONS[64], "BLOCK_K": 16}}  # with affines; 32 spill a few bytes
INVERSE_BACKWARD_OPTIONS = {**OPTIONS, 64: {**BACKWARD_OPTIONS[64], "maxnreg": 168}}  # 128 spill a few bytes


@triton.jit
def load_matrix(matrix, o_row, o_column, channels: tl.constexpr):
    """The block of a C×C matrix at these rows and columns, which broadcast; zeros outside."""
    p_matrix = matrix[0] + o_row * matrix[1] + o_column * matrix[2]
    return tl.load(p_matrix, mask=(o_row < channels) & (o_column < channels), other=0.0).to(tl.float32)


@triton.jit
def largest(b):
    """The largest magnitude of a tile, NaN where it holds one."""
    unsound = tl.max(tl.max((b != b).to(tl.int32), axis=1), axis=0)
    return tl.where(unsound > 0, float("nan"), tl.max(tl.max(tl.abs(b), axis=1), axis=0))


@triton.jit
def after_dh(
    dy,
    b_g,
    y,
    h,
    dh,
    pixel,
    i_c,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    eps,
    INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Store dh of the post-affine for tile i_c, from its output: the scaled value is y, or y + shift for the inverse."""
    if h is not None:
        o_c = channel_tile(i_c, BLOCK_C)
        b_dy = load(dy, pixel, o_c, o_c < channels)
        b_y = load(y, pixel, o_c, o_c < channels)
        b_shift, b_raw = load_pair(h, pixel, i_c, pass_through, channels, BLOCK_C, CHANNELS_LAST)
        b_v = b_y + b_shift if INVERSE else b_y
        _, b_dshift, b_draw = affine_map_gradients(b_dy, b_g, b_v, b_raw, eps, INVERSE)
        store_pair(dh, pixel, i_c, pass_through, channels, b_dshift, b_draw, BLOCK_C, CHANNELS_LAST)


@triton.jit(do_not_specialize=["pixels", "width"])
def flow_step_forward_kernel(
    x,  # (B, C, H, W)
    mix,  # (C, C)
    p_offset,  # (C,), contiguous
    h_before,  # (B, 2(C - pass_before), H, W) or None
    h_after,  # (B, 2(C - pass_after), H, W) or None
    y,  # (B, C, H, W)
    p_partial,  # (programs,), B times the tiles of a sample
    p_peak,  # likewise, or None
    pass_before: tl.constexpr,
    pass_after: tl.constexpr,
    eps,
    channels: tl.constexpr,
    pixels,
    width,
    INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """a = pre(x), w = mix·a + offset, y = post(w), this tile's share of the two log-dets, and its largest magnitude of y.

    Every program of a pixel tile computes all of a for its own channels of w; the first of them counts its log-det.
    """
    i_b, i_p, i_c = program(tl.cdiv(pixels, BLOCK_P), tl.cdiv(channels, BLOCK_C))
    pixel = pixel_tile(i_b, i_p, pixels, width, UNIT, BLOCK_P)
    o_c = channel_tile(i_c, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_logdet_before = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for i_k in range(BLOCKS_K):
        o_k = channel_tile(i_k, BLOCK_K)
        b_x = load(x, pixel, o_k, o_k < channels)
        b_a, b_logdet = affine_if_any(b_x, h_before, pixel, i_k, pass_before, channels, eps, INVERSE, BLOCK_K, CHANNELS_LAST)
        b_logdet_before += b_logdet
        acc = tl.dot(b_a, load_matrix(mix, o_c, tl.trans(o_k), channels), acc, input_precision="ieee")
    b_w = acc + tl.load(p_offset + o_c, mask=o_c < channels, other=0.0).to(tl.float32)
    b_y, b_logdet = affine_if_any(b_w, h_after, pixel, i_c, pass_after, channels, eps, INVERSE, BLOCK_C, CHANNELS_LAST)
    store(y, pixel, o_c, b_y, o_c < channels)
    logdet = tl.sum(b_logdet) + tl.where(i_c == 0, tl.sum(b_logdet_before), 0.0)
    tl.store(p_partial + tl.program_id(0), logdet)
    if p_peak is not None:
        tl.store(p_peak + tl.program_id(0), largest(tl.where(pixel[3] & (o_c < channels), b_y, 0.0)))


@triton.jit(do_not_specialize=["pixels", "width"])
def flow_step_backward_kernel(
    dy,  # (B, C, H, W)
    dlogdet,  # (B,)
    x,  # (B, C, H, W)
    y,  # (B, C, H, W)
    mix,  # (C, C)
    h_before,  # (B, 2(C - pass_before), H, W) or None
    h_after,  # (B, 2(C - pass_after), H, W) or None
    dx,  # (B, C, H, W)
    dh_before,  # as h_before
    dh_after,  # as h_after
    pass_before: tl.constexpr,
    pass_after: tl.constexpr,
    eps,
    channels: tl.constexpr,
    pixels,
    width,
    INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """dw = dy·∂post/∂w, da = mixᵀ·dw, dx = da·∂pre/∂x, and dh of both affines; g = dlogdet enters dh alone.

    Every program of a pixel tile computes all of dw for its own channels of da; it stores dh_after of those channels.
    """
    i_b, i_p, i_c = program(tl.cdiv(pixels, BLOCK_P), tl.cdiv(channels, BLOCK_C))
    pixel = pixel_tile(i_b, i_p, pixels, width, UNIT, BLOCK_P)
    o_c = channel_tile(i_c, BLOCK_C)
    b_g = tl.load(dlogdet[0] + i_b * dlogdet[1]).to(tl.float32)
    after_dh(dy, b_g, y, h_after, dh_after, pixel, i_c, pass_after, channels, eps, INVERSE, BLOCK_C, CHANNELS_LAST)
    b_da = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i_k in range(BLOCKS_K):
        o_k = channel_tile(i_k, BLOCK_K)
        b_dy = load(dy, pixel, o_k, o_k < channels)
        b_dw = after_dx(b_dy, h_after, pixel, i_k, pass_after, channels, eps, INVERSE, BLOCK_K, CHANNELS_LAST)
        b_da = tl.dot(b_dw, load_matrix(mix, tl.trans(o_k), o_c, channels), b_da, input_precision="ieee")
    b_dx = b_da
    if h_before is not None:
        b_x = load(x, pixel, o_c, o_c < channels)
        b_dx = mapped_backward(
            b_da,
            b_g,
            b_x,
            h_before,
            dh_before,
            pixel,
            i_c,
            pass_before,
            channels,
            eps,
            affine_map_backward,
            INVERSE,
            BLOCK_C,
            CHANNELS_LAST,
        )
    store(dx, pixel, o_c, b_dx, o_c < channels)


def _tiles(device: torch.device, kernel: str, channels: int, pixels: int, options: dict = OPTIONS, **_) -> tuple[int, dict]:
    """Tiles of a sample, and their sizes, of the forward and backward kernels."""
    block_c = block(channels, CHANNELS)
    sizes = tuned(device, kernel, channels, dict(options[block_c]))
    if channels > sizes["BLOCK_K"] and channels % sizes["BLOCK_K"]:
        sizes["BLOCK_K"] = 16
    sizes |= {"BLOCK_C": block_c, "BLOCKS_K": triton.cdiv(channels, sizes["BLOCK_K"])}
    return triton.cdiv(pixels, sizes["BLOCK_P"]) * triton.cdiv(channels, block_c), sizes


def flow_step_forward(
    x: Tensor, mix: Tensor, offset: Tensor, h_before: Tensor | None, h_after: Tensor | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y, logdet); mix (C, C), offset (C,) float32, h_before and h_after shift and raw interleaved, or None."""
    logdet = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    y, partial, _ = flow_step_parts(x, mix, offset, h_before, h_after, eps, inverse, watched=False)
    if partial.numel() == 0:
        return y, logdet.zero_()
    sum_partials(partial, 1, logdet)
    return y, logdet


def flow_step_parts(
    x: Tensor,
    mix: Tensor,
    offset: Tensor,
    h_before: Tensor | None,
    h_after: Tensor | None,
    eps: float,
    inverse: bool,
    watched: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, and of every tile of a sample the share of the log-det, and if `watched` the largest magnitude of y: (B, tiles)."""
    check_dtype(x)
    y, sizes = empty_like(x), extent(x, h_before, h_after, x)
    count, blocks = _tiles(x.device, "flow_step_forward", **sizes)
    parts = torch.empty(1 + watched, x.shape[0], count, dtype=torch.float32, device=x.device)
    partial, peak = parts[0], parts[1] if watched else None
    if x.numel() == 0:
        return y, partial, peak
    launch(
        flow_step_forward_kernel,
        partial.numel(),
        x.device,
        x=image(x),
        mix=matrix(mix),
        p_offset=dense(offset),
        h_before=image(h_before),
        h_after=image(h_after),
        y=image(y),
        p_partial=partial,
        p_peak=peak,
        eps=eps,
        INVERSE=inverse,
        **pass_through(x.shape[1], inverse),
        **sizes,
        **blocks,
    )
    return y, partial, peak


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
    """(dx, dmix, doffset, dh_before, dh_after) from the inputs of `flow_step_forward` and its y; None where h is, and for dmix
    and doffset with `mix_later`."""
    check_dtype(x)
    dx = empty_like(x)
    dh_before = None if h_before is None else empty_like(h_before)
    dh_after = None if h_after is None else empty_like(h_after)
    if x.numel() == 0:
        return dx, torch.zeros_like(mix), mix.new_zeros(mix.shape[0]), dh_before, dh_after
    sizes = extent(x, dy, y, h_before, h_after, dx, dh_before, dh_after)
    options = INVERSE_BACKWARD_OPTIONS if inverse else BACKWARD_OPTIONS
    options = OPTIONS if h_before is None and h_after is None else options
    count, blocks = _tiles(x.device, "flow_step_backward", **sizes, options=options)
    launch(
        flow_step_backward_kernel,
        x.shape[0] * count,
        x.device,
        dy=image(dy),
        dlogdet=per_sample(dlogdet),
        x=image(x),
        y=image(y),
        mix=matrix(mix),
        h_before=image(h_before),
        h_after=image(h_after),
        dx=image(dx),
        dh_before=image(dh_before),
        dh_after=image(dh_after),
        eps=eps,
        INVERSE=inverse,
        **pass_through(x.shape[1], inverse),
        **sizes,
        **blocks,
    )
    if mix_later:
        return dx, None, None, dh_before, dh_after
    dmix, doffset = flow_step_mix_backward([(dy, x, h_before, h_after)], eps, inverse)
    return dx, dmix[0].to(mix.dtype), doffset[0].to(mix.dtype), dh_before, dh_after
