"""The gradients of the matrices and offsets of several flow steps: products over all pixels, divided among programs.

    dmix = Σ_p dw[p] ⊗ a[p],   doffset = Σ_p dw[p]      a = before(x),  dw = dy · ∂after/∂w

A program sums a block of one matrix over one part of the tiles of a sample; a second kernel adds the parts, always in the same
order. Products are in real float32. a and dw are computed from what the steps read, so that neither is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import channel_tile, extent, launch, load, pixel_tile, program, sum_partials, tuned
from ncsr_fast.kernels._flow_step import affine_if_any, after_dx, block, pass_through
from ncsr_fast.kernels._networks import images, one_of

# Chosen as those of the other kernels of a step
CHANNELS = 32  # at most, of a block; 64 spill
PIXELS = {16: 32, 32: 16}  # at once, in the loop over the pixels of a sample, by the channels of the block
PROGRAMS = 512  # of a step, about, and at least one a sample: two rounds of 132 multiprocessors
OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 168}  # 3 stages of the loads of that loop spill on sm_80
Step = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]  # dy, x, h_before and h_after


@triton.jit(do_not_specialize=["pixels", "width", "tiles", "steps"])
def flow_step_backward_weight_kernel(
    p_dy,  # of each step, (B, C, H, W)
    dy_strides,
    p_x,  # (B, C, H, W)
    x_strides,
    p_before,  # (B, 2(C - pass_before), H, W) or None
    before_strides,
    p_after,  # (B, 2(C - pass_after), H, W) or None
    after_strides,
    p_partial,  # (B times the parts of a sample, steps, C·C + C): of dmix, and of doffset
    steps,
    pass_before: tl.constexpr,
    pass_after: tl.constexpr,
    eps,
    channels: tl.constexpr,
    pixels,
    width,
    tiles,
    INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dmix and doffset over one part of the tiles of a sample, for a block of outputs and inputs of a step."""
    n_parts, n_blocks = tl.cdiv(tl.cdiv(pixels, BLOCK_P), tiles), tl.cdiv(channels, BLOCK_C)
    i_sample, i_part, i_block = program(n_parts, n_blocks * n_blocks)
    i_step, i_b = i_sample % steps, i_sample // steps
    i_out, i_in = i_block // n_blocks, i_block % n_blocks
    dy, x = (one_of(p_dy, i_step),) + dy_strides, (one_of(p_x, i_step),) + x_strides
    h_before = None if p_before is None else (one_of(p_before, i_step),) + before_strides
    h_after = None if p_after is None else (one_of(p_after, i_step),) + after_strides
    o_out, o_in = channel_tile(i_out, BLOCK_C), channel_tile(i_in, BLOCK_C)
    b_dmix = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    b_dw_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i_t in range(tiles):
        pixel = pixel_tile(i_b, i_part * tiles + i_t, pixels, width, UNIT, BLOCK_P)
        b_dy = load(dy, pixel, o_out, o_out < channels)
        b_dw = after_dx(b_dy, h_after, pixel, i_out, pass_after, channels, eps, INVERSE, BLOCK_C, CHANNELS_LAST)
        b_x = load(x, pixel, o_in, o_in < channels)
        b_a, _ = affine_if_any(b_x, h_before, pixel, i_in, pass_before, channels, eps, INVERSE, BLOCK_C, CHANNELS_LAST)
        b_dw_sum += b_dw
        b_dmix = tl.dot(tl.trans(b_dw), b_a, b_dmix, input_precision="ieee")
    o_row = tl.trans(o_out)
    p_partial += ((i_b * n_parts + i_part) * steps + i_step) * (channels * channels + channels)
    tl.store(p_partial + o_row * channels + o_in, b_dmix, mask=(o_row < channels) & (o_in < channels))
    if i_in == 0:  # doffset once, not for every block of inputs
        p_doffset = p_partial + channels * channels + o_out
        tl.store(p_doffset, tl.sum(b_dw_sum, axis=0)[None, :], mask=o_out < channels)


def flow_step_mix_backward(steps: Sequence[Step], eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """As the reference's, in float32; two launches for steps one after the other that have the same affines."""
    runs = [list(run) for _, run in groupby(steps, key=lambda step: (step[2] is None, step[3] is None))]
    found = [_mix_backward(run, eps, inverse) for run in runs]
    dmix, doffset = (parts[0] if len(found) == 1 else torch.cat(parts) for parts in zip(*found))
    return dmix, doffset


def _mix_backward(steps: Sequence[Step], eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the mixes and offsets of steps that have the same affines."""
    dy, x, before, after = zip(*steps)
    batch, channels, height, width = x[0].shape
    found = torch.empty(len(steps), channels * channels + channels, dtype=torch.float32, device=x[0].device)
    dmix, doffset = found[:, : channels * channels].unflatten(1, (channels, channels)), found[:, channels * channels :]
    if x[0].numel() == 0:
        found.zero_()
        return dmix, doffset
    parts, blocks, sizes = _tiles(x[0].device, batch, channels, height * width)
    partial = torch.empty(batch * parts, found.numel(), dtype=torch.float32, device=x[0].device)
    launch(
        flow_step_backward_weight_kernel,
        batch * len(steps) * parts * blocks,
        x[0].device,
        **images("dy", dy),
        **images("x", x),
        **images("before", before),
        **images("after", after),
        p_partial=partial,
        steps=len(steps),
        eps=eps,
        INVERSE=inverse,
        **pass_through(channels, inverse),
        **extent(x[0], *dy, *x[1:], *before, *after),
        **sizes,
    )
    sum_partials(partial, 0, found)
    return dmix, doffset


def _tiles(device: torch.device, batch: int, channels: int, pixels: int) -> tuple[int, int, dict[str, int]]:
    """Parts of a sample, blocks of the matrix, and the sizes of both."""
    block_c = block(channels, CHANNELS)
    sizes = tuned(device, "flow_step_backward_weight", channels, {"BLOCK_P": PIXELS[block_c], **OPTIONS})
    tiles, blocks = triton.cdiv(pixels, sizes["BLOCK_P"]), triton.cdiv(channels, block_c) ** 2
    tiles_of_part = triton.cdiv(tiles, max(1, PROGRAMS // (batch * blocks)))
    return triton.cdiv(tiles, tiles_of_part), blocks, {"BLOCK_C": block_c, "tiles": tiles_of_part, **sizes}
