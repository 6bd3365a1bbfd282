"""The weights of hoisted convolutions by slot (`hoisting`), and the gradients of weight and bias.

    v[n, s, (i, j)] = Σ w[n, s, (d, e)] over the rows d of slot i and the columns e of slot j
    dv[n, s, (i, j)] = Σ_{r, p} dy[f·r + p, n] · stacked[r + e, s] over the phases p of the slot

and dw sums the dv of the slots that it is in. The weight of the own features, and its gradient, are those of a 3×3 convolution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, image, launch
from ncsr_fast.kernels._conv3x3 import cell_tile, distance, in_runs, inside, pixel_of
from ncsr_fast.kernels._conv3x3_weight import OPTIONS, PROGRAMS, sum_partials, weight_partials
from ncsr_fast.layout import in_memory

BLOCK = 64  # inputs that a program of the two small kernels reads at once, of up to 32 slots, 16 numbers a thread


def slots(factor: int) -> int:
    """Slots along an axis."""
    return min(factor + 2, 5)


@triton.jit
def has_tap(slot, i_tap, SLOTS: tl.constexpr):
    """True where slot, of both axes, is a sum in which the weight of a tap is."""
    return is_in(slot // SLOTS, i_tap // 3, SLOTS) & is_in(slot % SLOTS, i_tap % 3, SLOTS)


@triton.jit
def is_in(slot, d, SLOTS: tl.constexpr):
    """True where slot is a sum in which w(d), d ∈ {0, 1, 2}, is."""
    first = tl.where(slot == SLOTS - 1, 2, tl.where(slot == 1, 1, 0))
    last = tl.where(slot == 0, 0, tl.where(slot == SLOTS - 2, 1, 2))
    return (first <= d) & (d <= last)


@triton.jit
def weights_by_slot_kernel(
    weight,  # (outputs, owned + inputs, 3, 3): pointer, and strides of an output, an input, a row and a column
    p_own,  # (outputs, 9, owned)
    p_stacked,  # (outputs, SLOTS², inputs)
    owned: tl.constexpr,
    inputs: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the inputs of one output, BLOCK at once, and write their sums."""
    BLOCKS: tl.constexpr = (owned + inputs + BLOCK - 1) // BLOCK
    i_n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_c = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    o_slot = tl.arange(0, 32)[:, None]
    b_sum = tl.zeros([32, BLOCK], tl.float32)
    for i_tap in tl.static_range(9):
        p = weight[0] + i_n * weight[1] + o_c.to(tl.int64) * weight[2] + i_tap // 3 * weight[3] + i_tap % 3 * weight[4]
        b = tl.load(p, mask=o_c < owned + inputs, other=0.0)
        tl.store(p_own + (i_n * 9 + i_tap) * owned + o_c, b.to(p_own.dtype.element_ty), mask=o_c < owned)
        b_sum += tl.where(has_tap(o_slot, i_tap, SLOTS), b.to(tl.float32), 0.0)
    p = p_stacked + (i_n * (SLOTS * SLOTS) + o_slot) * inputs + (o_c - owned)
    m = (o_slot < SLOTS * SLOTS) & (o_c >= owned) & (o_c < owned + inputs)
    tl.store(p, b_sum.to(p_stacked.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["height", "width", "total", "tiles"])
def hoisted_weight_kernel(
    dy,  # (B, outputs, f·H, f·W)
    x,  # (B, inputs, H, W)
    p_partial,  # (parts, SLOTS², outputs, inputs)
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    height,
    width,
    total,
    tiles,
    FACTOR: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sum over `tiles` of the `total` tiles of cells, from the first of this program, for a slot and a block of dv."""
    BLOCKS_C: tl.constexpr = (inputs + BLOCK_C - 1) // BLOCK_C
    BLOCKS: tl.constexpr = BLOCKS_C * ((outputs + BLOCK_N - 1) // BLOCK_N)
    i_part, i = tl.program_id(0) // (SLOTS * SLOTS * BLOCKS), tl.program_id(0) % (SLOTS * SLOTS * BLOCKS)
    i_slot, i_n, i_c = i // BLOCKS, i % BLOCKS // BLOCKS_C, i % BLOCKS_C
    o_n, o_c = channel_tile(i_n, BLOCK_N), channel_tile(i_c, BLOCK_C)
    first_row, n_rows, rows = phases(i_slot // SLOTS, FACTOR, SLOTS)
    first_column, n_columns, columns = phases(i_slot % SLOTS, FACTOR, SLOTS)
    tiles_of_sample = tl.cdiv(height.to(tl.int64) * width, BLOCK_P)
    first, last = i_part.to(tl.int64) * tiles, tl.minimum((i_part.to(tl.int64) + 1) * tiles, total)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i_t in range(first * (n_rows * n_columns), last * (n_rows * n_columns)):
        i_tile, i_phase = i_t // (n_rows * n_columns), tl.cast(i_t % (n_rows * n_columns), tl.int32)
        i_b, cell = i_tile // tiles_of_sample, cell_tile(i_tile % tiles_of_sample, height, width, BLOCK_P)
        phase = first_row + i_phase // n_columns, first_column + i_phase % n_columns
        pixel = pixel_of(cell, i_b, phase, height, width, FACTOR)
        b_dy = tl.load(at(dy, pixel, o_n), mask=pixel[3] & (o_n < outputs), other=0.0)
        p_x = at(x, pixel_of(cell, i_b, (0, 0), height, width, 1), o_c) + distance(x, rows, columns, width)
        b_x = tl.load(p_x, mask=inside(cell, rows, columns, height, width, 1) & (o_c < inputs), other=0.0)
        acc = tl.dot(tl.trans(b_dy), b_x.to(b_dy.dtype), acc, input_precision=PRECISION)
    o_row = tl.trans(o_n)
    p = p_partial + ((i_part.to(tl.int64) * (SLOTS * SLOTS) + i_slot) * outputs + o_row) * inputs + o_c
    tl.store(p, acc, mask=(o_row < outputs) & (o_c < inputs))


@triton.jit
def phases(slot, FACTOR: tl.constexpr, SLOTS: tl.constexpr):
    """The first phase of a slot, the number of its phases, and the distance of the cell that it looks at."""
    if FACTOR == 1:
        return 0, 1, slot - 1
    else:
        first = tl.where(slot < 2, 0, tl.where(slot >= SLOTS - 2, FACTOR - 1, 1))
        count = tl.where((slot >= 2) & (slot < SLOTS - 2), FACTOR - 2, 1)
        return first, count, tl.where(slot == 0, -1, tl.where(slot == SLOTS - 1, 1, 0))


@triton.jit(do_not_specialize=["parts"])
def sum_slots_kernel(
    p_partial,  # (parts, SLOTS², outputs, inputs)
    p_dweight,  # (outputs, owned + inputs, 9)
    parts,
    owned: tl.constexpr,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the stacked inputs of one output: of a tap the sum over parts and the slots that it is in, in float64."""
    BLOCKS: tl.constexpr = (inputs + BLOCK - 1) // BLOCK
    i_n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_c = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    o_slot = tl.arange(0, 32)[:, None]
    b_sum = tl.zeros([32, BLOCK], tl.float64)
    for i_part in range(parts):
        o = tl.cast(i_part, tl.int64) * (SLOTS * SLOTS) + o_slot
        p = p_partial + (o * outputs + i_n) * inputs + o_c
        b_sum += tl.load(p, mask=(o_slot < SLOTS * SLOTS) & (o_c < inputs), other=0.0).to(tl.float64)
    for i_tap in tl.static_range(9):
        b = tl.sum(tl.where(has_tap(o_slot, i_tap, SLOTS), b_sum, 0.0), axis=0)[None, :]
        p_to = p_dweight + (i_n * (owned + inputs) + owned + o_c) * 9 + i_tap
        tl.store(p_to, b.to(tl.float32).to(p_dweight.dtype.element_ty), mask=o_c < inputs)


def weights_by_slot(weight: Tensor, owned: int, factor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w (outputs, 9, owned) of the own features, and v (outputs, slots², inputs) of the stacked ones, in this dtype."""
    weight, (outputs, inputs) = in_memory(weight), weight.shape[:2]
    own = torch.empty(outputs, 9, owned, dtype=dtype, device=weight.device)
    stacked = torch.empty(outputs, slots(factor) ** 2, inputs - owned, dtype=dtype, device=weight.device)
    launch(
        weights_by_slot_kernel,
        outputs * triton.cdiv(inputs, BLOCK),
        weight.device,
        weight=(weight, *weight.stride()),
        p_own=own,
        p_stacked=stacked,
        owned=owned,
        inputs=inputs - owned,
        SLOTS=slots(factor),
        BLOCK=BLOCK,
    )
    return own, stacked


def backward_weight(dy: Tensor, own: Tensor, stacked: Tensor, dweight: Tensor, dbias: Tensor, factor: int, tf32: bool) -> None:
    """Write the gradients of the weight (outputs, owned + inputs, 3, 3) and of the bias, dense and of one dtype."""
    (batch, inputs, height, width), owned, outputs = stacked.shape, own.shape[1], dy.shape[1]
    sum_partials(weight_partials(dy, own, tf32=tf32)[0], dweight[:, :owned], dbias)
    kind = arithmetic(dy, tf32)
    options = OPTIONS[kind] | ({} if in_runs(stacked) and in_runs(dy) else {"num_warps": 8})
    for name, channels in (("BLOCK_N", outputs), ("BLOCK_C", inputs)):
        options[name] = min(options[name], max(16, triton.next_power_of_2(channels)))
    blocks = slots(factor) ** 2 * triton.cdiv(outputs, options["BLOCK_N"]) * triton.cdiv(inputs, options["BLOCK_C"])
    total = batch * triton.cdiv(height * width, options["BLOCK_P"])
    tiles = triton.cdiv(total, max(1, PROGRAMS // blocks))
    parts = triton.cdiv(total, tiles)
    partial = torch.empty(parts, slots(factor) ** 2, outputs, inputs, dtype=torch.float32, device=dy.device)
    sizes = {"inputs": inputs, "outputs": outputs, "SLOTS": slots(factor)}
    launch(
        hoisted_weight_kernel,
        parts * blocks,
        dy.device,
        dy=image(dy),
        x=image(stacked),
        p_partial=partial,
        height=height,
        width=width,
        total=total,
        tiles=tiles,
        FACTOR=factor,
        PRECISION="tf32" if kind == "tf32" else "ieee",
        **sizes,
        **options,
    )
    launch(
        sum_slots_kernel,
        outputs * triton.cdiv(inputs, BLOCK),
        dy.device,
        p_partial=partial,
        p_dweight=dweight,
        parts=parts,
        owned=owned,
        BLOCK=BLOCK,
        **sizes,
    )
