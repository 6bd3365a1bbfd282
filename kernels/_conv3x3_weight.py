"""The gradients of a 3×3 convolution's weight and bias: products over all pixels, divided among programs.

    dw[n, c, d] = Σ_p dy[p, n] · x[p + d, c],    dbias[n] = Σ_p dy[p, n]

A program sums one tap of a block of the weight over one part of the tiles of all samples, on tensor cores where the
convolution is; a second kernel adds the parts in float64, always in the same order, so the same inputs give the same bits,
and writes the gradients where and in which dtype they are wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, image, launch, load
from ncsr_fast.kernels._conv3x3 import cell_tile, distance, in_runs, inside, pixel_of, step

# Sizes of tiles: outputs and inputs (at most), pixels added at once, and stages of loads on their way; by how numbers are
# multiplied. Chosen for registers and shared memory by the ahead-of-time report, never timed: no GPU yet. Unless told how many
# registers a thread may have, ptxas spills a few bytes to fit another program.
OPTIONS = {
    "half": {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_P": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "tf32": {"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_P": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "ieee": {"BLOCK_N": 32, "BLOCK_C": 32, "BLOCK_P": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
}
PROGRAMS = 512  # about: two rounds of 132 multiprocessors, whose partial sums are a few MB
SUM_OUTPUTS, SUM_PARTS = 128, 16  # of a program of the second kernel, at once: 512 bytes of every part


@triton.jit(do_not_specialize=["height", "width", "total", "tiles", "parts"])
def conv3x3_weight_kernel(
    dy,  # (B, outputs, H, W)
    x,  # (B, inputs, H, W)
    p_partial,  # (parts, 9 · outputs · inputs + outputs): of dw as (9, outputs, inputs), and of dbias
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    height,
    width,
    total,
    tiles,
    parts,
    UPSAMPLE2X: tl.constexpr,
    GROWTH: tl.constexpr,
    GROWN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sum over `tiles` tiles of this program, out of `total` of all samples, for a tap and a block of dw.

    height, width: of x, whose pixels are the cells. The programs of the first tap and inputs sum dbias as well.
    parts: of one batch; the samples are those of as many batches, one after the other, as there are programs for
    GROWTH, GROWN: where they are not 0, outputs are those of GROWN convolutions of GROWTH outputs and of another, each of which
        reads GROWTH channels more than the one before, the last one all; what no convolution reads is 0
    """
    SIDE: tl.constexpr = 2 if UPSAMPLE2X else 1
    BLOCKS_C: tl.constexpr = (inputs + BLOCK_C - 1) // BLOCK_C
    BLOCKS: tl.constexpr = BLOCKS_C * ((outputs + BLOCK_N - 1) // BLOCK_N)
    i_part, i = tl.program_id(0) // (9 * BLOCKS), tl.program_id(0) % (9 * BLOCKS)
    i_tap, i_n, i_c = i // BLOCKS, i % BLOCKS // BLOCKS_C, i % BLOCKS_C
    o_n, o_c = channel_tile(i_n, BLOCK_N), channel_tile(i_c, BLOCK_C)
    tiles_of_phase = tl.cdiv(height.to(tl.int64) * width, BLOCK_P)
    i_batch = (i_part // parts).to(tl.int64)
    first = i_batch * total + (i_part % parts).to(tl.int64) * tiles
    last = tl.minimum(first + tiles, (i_batch + 1) * total)
    if GROWTH > 0:
        unread = tl.maximum(GROWN - tl.minimum((i_n + 1) * BLOCK_N, outputs) // GROWTH, 0) * GROWTH
        end = tl.where(i_c * BLOCK_C < inputs - unread, last, first)
    else:
        end = last
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_t in range(first, end):
        i_b, phase, cell = tile_of(i_t, tiles_of_phase, height, width, SIDE, BLOCK_P)
        pixel = pixel_of(cell, i_b, phase, height, width, SIDE)
        b_dy = tl.load(at(dy, pixel, o_n), mask=pixel[3] & (o_n < outputs), other=0.0)
        rows, columns = step(i_tap, phase, 1, SIDE)
        p_x = at(x, pixel_of(cell, i_b, (0, 0), height, width, 1), o_c) + distance(x, rows, columns, width)
        b_x = tl.load(p_x, mask=inside(cell, rows, columns, height, width, 1) & (o_c < inputs), other=0.0)
        acc = tl.dot(tl.trans(b_dy), b_x.to(b_dy.dtype), acc, input_precision=PRECISION)
    p_partial += i_part.to(tl.int64) * (9 * outputs * inputs + outputs)
    o_row = tl.trans(o_n)
    p_dweight = p_partial + (i_tap * outputs + o_row) * inputs + o_c
    tl.store(p_dweight, acc, mask=(o_row < outputs) & (o_c < inputs))
    if (i_tap == 0) & (i_c == 0):
        b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for i_t in range(first, last):
            i_b, phase, cell = tile_of(i_t, tiles_of_phase, height, width, SIDE, BLOCK_P)
            b_sum += load(dy, pixel_of(cell, i_b, phase, height, width, SIDE), o_n, o_n < outputs)
        p_dbias = p_partial + 9 * outputs * inputs + o_n
        tl.store(p_dbias, tl.sum(b_sum, axis=0)[None, :], mask=o_n < outputs)


@triton.jit
def tile_of(i_t, tiles_of_phase, height, width, SIDE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, phase and cells of tile i_t of the batch."""
    i_phase = i_t // tiles_of_phase % (SIDE * SIDE)
    cell = cell_tile(i_t % tiles_of_phase, height, width, BLOCK_P)
    return i_t // (tiles_of_phase * SIDE * SIDE), (i_phase // 2, i_phase % 2), cell


@triton.jit(do_not_specialize=["parts"])
def sum_weight_partials_kernel(
    p_partial,  # (parts, 9 · outputs · inputs + outputs)
    dweight,  # pointer, and strides of an output, an input, a row and a column
    p_dbias,  # (outputs,)
    parts,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The sums over the parts, in float64."""
    WEIGHTS: tl.constexpr = 9 * outputs * inputs
    o = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    b_sum = tl.zeros([BLOCK_PARTS, BLOCK], tl.float64)
    for i_part in range(0, parts, BLOCK_PARTS):
        o_part = (i_part + tl.arange(0, BLOCK_PARTS)).to(tl.int64)[:, None]
        m = (o_part < parts) & (o < WEIGHTS + outputs)
        b_sum += tl.load(p_partial + o_part * (WEIGHTS + outputs) + o, mask=m, other=0.0).to(tl.float64)
    b = tl.sum(b_sum, axis=0)[None, :].to(tl.float32)
    o_tap, o_n, o_c = o // (outputs * inputs), o // inputs % outputs, o % inputs
    p_dweight = dweight[0] + o_n * dweight[1] + o_c * dweight[2] + o_tap // 3 * dweight[3] + o_tap % 3 * dweight[4]
    tl.store(p_dweight, b.to(dweight[0].dtype.element_ty), mask=o < WEIGHTS)
    tl.store(p_dbias + o - WEIGHTS, b.to(p_dbias.dtype.element_ty), mask=(o >= WEIGHTS) & (o < WEIGHTS + outputs))


def backward_weight(dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor, *, upsample2x: bool, tf32: bool) -> None:
    """Write the gradients of the weight (outputs, inputs, 3, 3), at any strides, and of the bias, contiguous, in any dtypes."""
    sum_partials(weight_partials(dy, x, upsample2x=upsample2x, tf32=tf32)[0], dweight, dbias)


def weight_partials(
    dy: Tensor, x: Tensor, *, batches: int = 1, growth: tuple[int, int] = (0, 0), upsample2x: bool = False, tf32: bool = False
) -> Tensor:
    """Sums (batches, parts, 9 · outputs · inputs + outputs) over parts of the pixels of each of several batches.

    They are the gradient of the weight as (9, outputs, inputs), and that of the bias.

    Args:
        dy: (batches · B, outputs, H, W).
        x: (batches · B, inputs, H, W).
        batches: Number of batches.
        growth: GROWTH and GROWN of the kernel.
        upsample2x: As the convolution's.
        tf32: Likewise.
    """
    samples, inputs, height, width = x.shape
    outputs, kind, side = dy.shape[1], arithmetic(dy, tf32), 2 if upsample2x else 1
    options = OPTIONS[kind] | ({} if in_runs(x) and in_runs(dy) else {"num_warps": 8})
    for name, channels in (("BLOCK_N", outputs), ("BLOCK_C", inputs)):
        options[name] = min(options[name], max(16, triton.next_power_of_2(channels)))
    blocks = 9 * triton.cdiv(outputs, options["BLOCK_N"]) * triton.cdiv(inputs, options["BLOCK_C"])
    total = samples // batches * side**2 * triton.cdiv(height * width, options["BLOCK_P"])
    tiles = triton.cdiv(total, max(1, PROGRAMS // (blocks * batches)))
    parts = triton.cdiv(total, tiles)
    partial = torch.empty(batches, parts, 9 * outputs * inputs + outputs, dtype=torch.float32, device=x.device)
    launch(
        conv3x3_weight_kernel,
        batches * parts * blocks,
        x.device,
        dy=image(dy),
        x=image(x),
        p_partial=partial,
        inputs=inputs,
        outputs=outputs,
        height=height,
        width=width,
        total=total,
        tiles=tiles,
        parts=parts,
        UPSAMPLE2X=upsample2x,
        GROWTH=growth[0],
        GROWN=growth[1],
        PRECISION="tf32" if kind == "tf32" else "ieee",
        **options,
    )
    return partial


def sum_partials(partial: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """Write the sums of a batch's partial sums to the gradients of weight, at any strides, and bias, contiguous."""
    launch(
        sum_weight_partials_kernel,
        triton.cdiv(partial.shape[1], SUM_OUTPUTS),
        partial.device,
        p_partial=partial,
        dweight=(dweight, *dweight.stride()),
        p_dbias=dbias,
        parts=len(partial),
        inputs=dweight.shape[1],
        outputs=dweight.shape[0],
        BLOCK=SUM_OUTPUTS,
        BLOCK_PARTS=SUM_PARTS,
    )
