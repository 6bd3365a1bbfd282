"""The gradients of the weights of several networks: products over all pixels, divided among programs.

    dw3[n, c, d] = Σ_p dh[p, n] · h2[p + d, c],   db3[n] = Σ_p dh[p, n]       taps d of a 3×3 convolution
    dw2[n, c]    = Σ_p dh2[p, n] · h1[p, c],      db2[n] = Σ_p dh2[p, n]      where `hidden_backward` left no sums of parts
    dw1[n, c, d] = Σ_p dpre[p, n] · z1[p + d, c]

A program sums one tap of a block of the weight of one network over one part of the tiles of all samples, on tensor cores where
the forward products are; a second kernel adds the parts in float64. Both go in an order that depends on the sizes of the images
alone: the same inputs give the same bits, and so they do whichever networks share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, launch, load
from ncsr_fast.kernels._networks import images, one_of
from ncsr_fast.kernels._step_network import COLUMNS, moved, rectangle, relu
from ncsr_fast.layout import writable

# Sizes of tiles: outputs and inputs (at most), rows of 16 pixels added at once, and stages of loads on their way; by how
# numbers are multiplied. Chosen for registers and shared memory by the ahead-of-time report, never timed: no GPU yet.
OPTIONS = {
    "half": {"BLOCK_N": 64, "BLOCK_C": 64, "ROWS": 4, "num_warps": 4, "num_stages": 3},
    "tf32": {"BLOCK_N": 32, "BLOCK_C": 64, "ROWS": 2, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "ieee": {"BLOCK_N": 32, "BLOCK_C": 32, "ROWS": 2, "num_warps": 4, "num_stages": 2, "maxnreg": 255},
}
PARTS = {9: 16, 1: 48}  # by taps, at most: of 16 networks at least 6 programs a multiprocessor of 132, and 13 MB of sums
SUM_OUTPUTS, SUM_PARTS = 128, 16  # of a program of the second kernel, at once: 512 bytes of every part


@triton.jit(do_not_specialize=["height", "width", "total", "tiles"])
def network_weight_kernel(
    p_dy,  # of each network, (B, outputs, H, W)
    dy_strides,
    p_x,  # (B, inputs, H, W)
    x_strides,
    p_partial,  # (networks, parts, TAPS · outputs · inputs + outputs): of dw as (TAPS, outputs, inputs), and of db
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    height,
    width,
    total,
    tiles,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum over `tiles` of the `total` tiles of all samples, from the first of this program, for a tap and a block of dw.

    With BIAS the programs of the first tap and inputs sum db as well.
    """
    BLOCKS_C: tl.constexpr = (inputs + BLOCK_C - 1) // BLOCK_C
    BLOCKS: tl.constexpr = BLOCKS_C * ((outputs + BLOCK_N - 1) // BLOCK_N)
    parts = tl.cdiv(total, tiles)
    i_all, i = tl.program_id(0) // (TAPS * BLOCKS), tl.program_id(0) % (TAPS * BLOCKS)
    i_network, i_part = i_all // parts, i_all % parts
    i_tap, i_n, i_c = i // BLOCKS, i % BLOCKS // BLOCKS_C, i % BLOCKS_C
    dy, x = (one_of(p_dy, i_network),) + dy_strides, (one_of(p_x, i_network),) + x_strides
    o_n, o_c = channel_tile(i_n, BLOCK_N), channel_tile(i_c, BLOCK_C)
    tiles_of_sample = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    first, last = i_part.to(tl.int64) * tiles, tl.minimum((i_part.to(tl.int64) + 1) * tiles, total)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_t in range(first, last):
        pixel = rectangle(i_t // tiles_of_sample, i_t % tiles_of_sample, height, width, ROWS, COLUMNS)
        b_dy = tl.load(at(dy, pixel, o_n), mask=pixel[3] & (o_n < outputs), other=0.0)
        near = moved(pixel, i_tap, height, width) if TAPS == 9 else pixel
        b_x = tl.load(at(x, near, o_c), mask=near[3] & (o_c < inputs), other=0.0)
        b_x = relu(b_x) if POSITIVE else b_x
        acc = tl.dot(tl.trans(b_dy), b_x.to(b_dy.dtype), acc, input_precision=PRECISION)
    p_partial += i_all.to(tl.int64) * (TAPS * outputs * inputs + outputs)
    o_row = tl.trans(o_n)
    p_dweight = p_partial + (i_tap * outputs + o_row) * inputs + o_c
    tl.store(p_dweight, acc, mask=(o_row < outputs) & (o_c < inputs))
    if (i_tap == 0) & (i_c == 0) & BIAS:
        b_sum = tl.zeros([ROWS * COLUMNS, BLOCK_N], tl.float32)
        for i_t in range(first, last):
            pixel = rectangle(i_t // tiles_of_sample, i_t % tiles_of_sample, height, width, ROWS, COLUMNS)
            b_sum += load(dy, pixel, o_n, o_n < outputs)
        p_dbias = p_partial + TAPS * outputs * inputs + o_n
        tl.store(p_dbias, tl.sum(b_sum, axis=0)[None, :], mask=o_n < outputs)


@triton.jit(do_not_specialize=["parts"])
def sum_network_partials_kernel(
    p_partial,  # of each network, (parts, TAPS · outputs · inputs + outputs)
    p_dweight,  # of each network, (outputs, inputs, k, k), with the same strides
    dweight_strides,
    p_dbias,  # of each network, (outputs,), or None
    parts,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The sums over the parts, in float64."""
    WEIGHTS: tl.constexpr = TAPS * outputs * inputs
    BLOCKS: tl.constexpr = (WEIGHTS + outputs + BLOCK - 1) // BLOCK
    i_network, i = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    p_own = one_of(p_partial, i_network)
    b_sum = tl.zeros([BLOCK_PARTS, BLOCK], tl.float64)
    for i_part in range(0, parts, BLOCK_PARTS):
        o_part = (i_part + tl.arange(0, BLOCK_PARTS)).to(tl.int64)[:, None]
        m = (o_part < parts) & (o < WEIGHTS + outputs)
        b_sum += tl.load(p_own + o_part * (WEIGHTS + outputs) + o, mask=m, other=0.0).to(tl.float64)
    b = tl.sum(b_sum, axis=0)[None, :].to(tl.float32)
    o_tap, o_n, o_c = o // (outputs * inputs), o // inputs % outputs, o % inputs
    p = one_of(p_dweight, i_network)
    by_output, by_input, by_row, by_column = dweight_strides
    p += o_n * by_output + o_c * by_input + o_tap // 3 * by_row + o_tap % 3 * by_column
    tl.store(p, b.to(p.dtype.element_ty), mask=o < WEIGHTS)
    if p_dbias is not None:
        p = one_of(p_dbias, i_network) + o - WEIGHTS
        tl.store(p, b.to(p.dtype.element_ty), mask=(o >= WEIGHTS) & (o < WEIGHTS + outputs))


def step_network_weights_backward(passes: Sequence[tuple], gradients: Sequence[tuple], *, tf32: bool = False) -> None:
    """As the reference's."""
    z1, pre, h1, h2, dpre, dh2, dh, sums = zip(*passes)
    dw1, dw2, db2, dw3, db3 = zip(*gradients)
    _backward_weights(dh, h2, dw3, db3, tf32)
    if sums[0] is not None:
        _sum_partials(sums, dw2, db2)
    elif h1[0] is None:
        _backward_weights(dh2, pre, dw2, db2, tf32, positive=True)
    else:
        _backward_weights(dh2, h1, dw2, db2, tf32)
    if z1[0] is not None:
        _backward_weights(dpre, z1, dw1, None, tf32)


def _backward_weights(
    dy: Sequence[Tensor],
    x: Sequence[Tensor],
    dweight: Sequence[Tensor],
    dbias: Sequence[Tensor] | None,
    tf32: bool,
    positive: bool = False,
) -> None:
    """Write the gradients of weights (outputs, inputs, k, k), all with the same strides, and of biases, contiguous.

    positive: of x the positive part was multiplied by the weights
    """
    (batch, outputs, height, width), inputs, taps = dy[0].shape, x[0].shape[1], dweight[0].shape[2] ** 2
    if dy[0].numel() == 0:
        for gradient in (*dweight, *(dbias or ())):
            gradient.zero_()
        return
    kind = arithmetic(dy[0], tf32)
    options = dict(OPTIONS[kind])
    for name, channels in (("BLOCK_N", outputs), ("BLOCK_C", inputs)):
        options[name] = min(options[name], max(16, triton.next_power_of_2(channels)))
    blocks = taps * triton.cdiv(outputs, options["BLOCK_N"]) * triton.cdiv(inputs, options["BLOCK_C"])
    total = batch * triton.cdiv(height, options["ROWS"]) * triton.cdiv(width, COLUMNS)
    tiles = triton.cdiv(total, PARTS[taps])
    parts, sums = triton.cdiv(total, tiles), taps * outputs * inputs + outputs
    partial = torch.empty(len(dy), parts, sums, dtype=torch.float32, device=dy[0].device)
    launch(
        network_weight_kernel,
        len(dy) * parts * blocks,
        dy[0].device,
        **images("dy", dy),
        **images("x", x),
        p_partial=partial,
        inputs=inputs,
        outputs=outputs,
        height=height,
        width=width,
        total=total,
        tiles=tiles,
        TAPS=taps,
        BIAS=dbias is not None,
        POSITIVE=positive,
        PRECISION="tf32" if kind == "tf32" else "ieee",
        COLUMNS=COLUMNS,
        **options,
    )
    _sum_partials(list(partial), dweight, dbias)


def _sum_partials(partial: Sequence[Tensor], dweight: Sequence[Tensor], dbias: Sequence[Tensor] | None) -> None:
    """Write the sums over the parts of every network, in the order in which `network_weight_kernel` has them."""
    (parts, sums), (outputs, inputs, *taps) = partial[0].shape, dweight[0].shape
    launch(
        sum_network_partials_kernel,
        len(partial) * triton.cdiv(sums, SUM_OUTPUTS),
        partial[0].device,
        p_partial=tuple(partial),
        p_dweight=tuple(map(writable, dweight)),
        dweight_strides=dweight[0].stride(),
        p_dbias=None if dbias is None else tuple(map(writable, dbias)),
        parts=parts,
        inputs=inputs,
        outputs=outputs,
        TAPS=taps[0] * taps[1],
        BLOCK=SUM_OUTPUTS,
        BLOCK_PARTS=SUM_PARTS,
    )
