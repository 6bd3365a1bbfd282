"""The convolution of a level's condition u = [own, stacked], the latter upsampled by nearest neighbour, at its own resolution.

    y[f·r + p, n] = Σ_d Σ_c own[f·r + p + d, c] · w[n, c, d] + Σ_e Σ_s stacked[r + e, s] · v[n, s, p, e] + bias[n]

with d ∈ {-1, 0, 1}², for the pixel of phase p ∈ {0 … f-1}² of cell r: the f×f pixels of y that are copies of one stacked pixel.
Along an axis a window at the first phase looks at the cell before (e = -1) with w(-1) and at its own (e = 0) with w(0) + w(1);
at the last phase at its own with w(-1) + w(0), and at the cell behind (e = 1) with w(1); at those between at its own alone,
with the sum of all. So v has, along an axis, a slot for each pair of phase and e with a weight of its own:

    f = 1: w(-1), w(0), w(1);  f = 2: w(-1), w(0) + w(1), w(-1) + w(0), w(1);  f > 2: those, and w(-1) + w(0) + w(1) as third

and for f = 2 a pixel takes 4 products a stacked channel in place of 9. Backward, a stacked pixel sums the f + 2 pixels of dy
along an axis that looked at it: those of its cell and the nearest of the cells beside it.

Both parts are added in the registers of one program, so that y is written once. Its channels may be those of several networks,
each of which is then an image of its own. Products and what is read at once are as in `conv3x3`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, check_dtype, dense, image, launch, program
from ncsr_fast.kernels._conv3x3 import cell_tile, channels_at, distance, in_runs, inside, pixel_of
from ncsr_fast.kernels._hoisting_weight import backward_weight, slots, weights_by_slot
from ncsr_fast.kernels.conv3x3 import convolve
from ncsr_fast.layout import empty_channels_last, empty_like

# Sizes of tiles: pixels, outputs and inputs (at most), and stages of loads on their way; by how numbers are multiplied. There
# are thousands of outputs, so that tiles are larger than those of `conv3x3`: bytes of the L2 cache would bind. Chosen for
# registers and shared memory by the ahead-of-time report, never timed: no GPU yet.
OPTIONS = {
    "half": {"BLOCK_P": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "ieee": {"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def reach(phase, FACTOR: tl.constexpr, SLOTS: tl.constexpr):
    """The first of the cells that a phase looks at, as a distance; their number; and the slot of the first."""
    first = tl.where(phase == 0, -1, 0)
    last = tl.where(phase == FACTOR - 1, 1, 0)
    slot = tl.where(phase == 0, 0, tl.where(phase == FACTOR - 1, SLOTS - 2, 2))
    return first, last - first + 1, slot


@triton.jit
def looked(i, FACTOR: tl.constexpr, SLOTS: tl.constexpr):
    """Distance from a cell's first pixel, and slot, of the i-th of the f + 2 pixels along an axis that look at the cell."""
    phase = tl.minimum(tl.maximum(i - 1, 0), FACTOR - 1)
    cell = tl.where(i == 0, 1, tl.where(i == FACTOR + 1, -1, 0))
    slot = tl.where(i < 2, i, tl.where(i >= FACTOR, SLOTS - 2 + i - FACTOR, 2))
    return cell * FACTOR + phase, slot


@triton.jit(do_not_specialize=["height", "width"])
def hoisted_kernel(
    own,  # (B, owned, f·H, f·W)
    stacked,  # (B, inputs, H, W)
    p_own_weight,  # (outputs, 9, owned)
    p_weight,  # (outputs, SLOTS², inputs)
    p_bias,  # (outputs,)
    y,  # (groups · B, GROUP, f·H, f·W)
    by_group,  # elements from a group to the next
    owned: tl.constexpr,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    height,
    width,
    FACTOR: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y for a tile of cells at one phase, and a tile of outputs."""
    OWN_BLOCKS: tl.constexpr = (owned + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = (inputs + BLOCK_K - 1) // BLOCK_K
    tiles = FACTOR * FACTOR * tl.cdiv(height.to(tl.int64) * width, BLOCK_P)
    i_b, i_p, i_n = program(tiles, tl.cdiv(outputs, BLOCK_N))
    i_phase = (i_p % (FACTOR * FACTOR)).to(tl.int32)
    phase = i_phase // FACTOR, i_phase % FACTOR
    cell = cell_tile(i_p // (FACTOR * FACTOR), height, width, BLOCK_P)
    o_n, o_k = channel_tile(i_n, BLOCK_N), channel_tile(0, BLOCK_K)
    o_row = tl.trans(o_k)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    p_x = at(own, pixel_of(cell, i_b, (0, 0), height, width, FACTOR), 0) + channels_at(own, o_k)
    p_w = p_own_weight + o_n * (9 * owned) + o_row
    for i in range(9 * OWN_BLOCKS):
        i_tap, i_k = i // OWN_BLOCKS, i % OWN_BLOCKS * BLOCK_K
        rows, columns = phase[0] + i_tap // 3 - 1, phase[1] + i_tap % 3 - 1
        m = inside(cell, rows, columns, height, width, FACTOR) & (o_k < owned - i_k)
        b_x = tl.load(p_x + (distance(own, rows, columns, FACTOR * width) + channels_at(own, i_k)), mask=m, other=0.0)
        b_w = tl.load(p_w + (i_tap * owned + i_k), mask=(o_row < owned - i_k) & (o_n < outputs), other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    first_row, n_rows, row_slot = reach(phase[0], FACTOR, SLOTS)
    first_column, n_columns, column_slot = reach(phase[1], FACTOR, SLOTS)
    p_x = at(stacked, pixel_of(cell, i_b, (0, 0), height, width, 1), 0) + channels_at(stacked, o_k)
    p_w = p_weight + o_n * (SLOTS * SLOTS * inputs) + o_row
    for i in range(n_rows * n_columns * BLOCKS):
        i_tap, i_k = i // BLOCKS, i % BLOCKS * BLOCK_K
        i_row, i_column = i_tap // n_columns, i_tap % n_columns
        rows, columns = first_row + i_row, first_column + i_column
        m = inside(cell, rows, columns, height, width, 1) & (o_k < inputs - i_k)
        b_x = tl.load(p_x + (distance(stacked, rows, columns, width) + channels_at(stacked, i_k)), mask=m, other=0.0)
        slot = (row_slot + i_row) * SLOTS + column_slot + i_column
        b_w = tl.load(p_w + (slot * inputs + i_k), mask=(o_row < inputs - i_k) & (o_n < outputs), other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    acc += tl.load(p_bias + o_n, mask=o_n < outputs, other=0.0).to(tl.float32)
    pixel = pixel_of(cell, i_b, phase, height, width, FACTOR)
    p_y = at(y, pixel, o_n % GROUP) + o_n // GROUP * by_group
    tl.store(p_y, acc.to(y[0].dtype.element_ty), mask=pixel[3] & (o_n < outputs))


@triton.jit(do_not_specialize=["height", "width"])
def hoisted_backward_kernel(
    dy,  # (B, inputs, f·H, f·W)
    p_weight,  # (inputs, SLOTS², outputs)
    dx,  # (B, outputs, H, W)
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    height,
    width,
    FACTOR: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the stacked features for a tile of them and of their channels."""
    BLOCKS: tl.constexpr = (inputs + BLOCK_K - 1) // BLOCK_K
    i_b, i_p, i_n = program(tl.cdiv(height.to(tl.int64) * width, BLOCK_P), tl.cdiv(outputs, BLOCK_N))
    cell = cell_tile(i_p, height, width, BLOCK_P)
    o_n, o_k = channel_tile(i_n, BLOCK_N), channel_tile(0, BLOCK_K)
    o_row = tl.trans(o_k)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    p_x = at(dy, pixel_of(cell, i_b, (0, 0), height, width, FACTOR), 0) + channels_at(dy, o_k)
    p_w = p_weight + o_row * (SLOTS * SLOTS * outputs) + o_n
    for i in range((FACTOR + 2) * (FACTOR + 2) * BLOCKS):
        i_tap, i_k = i // BLOCKS, i % BLOCKS * BLOCK_K
        rows, row_slot = looked(i_tap // (FACTOR + 2), FACTOR, SLOTS)
        columns, column_slot = looked(i_tap % (FACTOR + 2), FACTOR, SLOTS)
        m = inside(cell, rows, columns, height, width, FACTOR) & (o_k < inputs - i_k)
        b_x = tl.load(p_x + (distance(dy, rows, columns, FACTOR * width) + channels_at(dy, i_k)), mask=m, other=0.0)
        p = p_w + (tl.cast(i_k, tl.int64) * (SLOTS * SLOTS * outputs) + (row_slot * SLOTS + column_slot) * outputs)
        b_w = tl.load(p, mask=(o_row < inputs - i_k) & (o_n < outputs), other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    pixel = pixel_of(cell, i_b, (0, 0), height, width, 1)
    tl.store(at(dx, pixel, o_n), acc.to(dx[0].dtype.element_ty), mask=pixel[3] & (o_n < outputs))


def hoisted_forward(
    own: Tensor, stacked: Tensor, weight: Tensor, bias: Tensor, *, groups: int = 1, tf32: bool = False
) -> list[Tensor]:
    """As the reference's; best where channels are adjacent, in multiples of 16."""
    check_dtype(own, "own")
    (batch, owned, *size), (_, inputs, height, width), outputs = own.shape, stacked.shape, len(weight)
    factor, group = size[0] // height, outputs // groups
    y = empty_channels_last((groups * batch, group, *size), own)
    images = [y[index * batch :][:batch] for index in range(groups)]
    if y.numel() == 0:
        return images
    own_weight, stacked_weight = weights_by_slot(weight, owned, factor, own.dtype)
    kind = arithmetic(own, tf32)
    options = _options(kind, outputs, all(map(in_runs, (own, stacked, y))))
    tiles = factor**2 * triton.cdiv(height * width, options["BLOCK_P"]) * triton.cdiv(outputs, options["BLOCK_N"])
    launch(
        hoisted_kernel,
        batch * tiles,
        own.device,
        own=image(own),
        stacked=image(stacked),
        p_own_weight=own_weight,
        p_weight=stacked_weight,
        p_bias=dense(bias),
        y=image(y),
        by_group=y.numel() // groups,
        owned=owned,
        inputs=inputs,
        outputs=outputs,
        height=height,
        width=width,
        FACTOR=factor,
        SLOTS=slots(factor),
        GROUP=group,
        PRECISION="tf32" if kind == "tf32" else "ieee",
        **options,
    )
    return images


def hoisted_backward(
    dy: Tensor,
    own: Tensor,
    stacked: Tensor,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
    *,
    tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's, but that the gradients of weight and bias are in the dtype of the weight."""
    check_dtype(own, "own")
    (batch, inputs, height, width), owned, outputs = stacked.shape, own.shape[1], len(weight)
    factor, kind = own.shape[2] // height, arithmetic(dy, tf32)
    down, dstacked = (empty_like(x) if need else None for x, need in zip((own, stacked), needed))
    if dy.numel() == 0:
        zeros = weight.new_zeros(weight.shape), weight.new_zeros(outputs)
        return down, dstacked, *(zeros if needed[2] else (None, None))
    own_weight, stacked_weight = weights_by_slot(weight, owned, factor, dy.dtype)
    if down is not None:
        as_image = own_weight.view(outputs, 3, 3, owned).permute(0, 3, 1, 2)
        convolve(dy, as_image, None, down, transposed=True, tf32=tf32)
    if dstacked is not None:
        options = _options(kind, inputs, in_runs(dy) and in_runs(dstacked))
        launch(
            hoisted_backward_kernel,
            batch * triton.cdiv(height * width, options["BLOCK_P"]) * triton.cdiv(inputs, options["BLOCK_N"]),
            dy.device,
            dy=image(dy),
            p_weight=stacked_weight,
            dx=image(dstacked),
            inputs=outputs,
            outputs=inputs,
            height=height,
            width=width,
            FACTOR=factor,
            SLOTS=slots(factor),
            PRECISION="tf32" if kind == "tf32" else "ieee",
            **options,
        )
    if not needed[2]:
        return down, dstacked, None, None
    dweight, dbias = torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(outputs)
    backward_weight(dy, own, stacked, dweight, dbias, factor, tf32)
    return down, dstacked, dweight, dbias


def _options(kind: str, outputs: int, runs: bool) -> dict[str, int]:
    """Sizes of the tiles, as those of `conv3x3` are changed where numbers have addresses of their own."""
    options = dict(OPTIONS[kind])
    if not runs:
        options |= {"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_K": min(32, options["BLOCK_K"]), "num_warps": 8, "maxnreg": 255}
    options["BLOCK_N"] = min(options["BLOCK_N"], max(16, triton.next_power_of_2(outputs)))
    return options
