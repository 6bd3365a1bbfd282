"""Functions that the kernels of the steps' networks share: packed weights, rectangles of pixels, the product over nine taps.

A 3×3 convolution is nine products: of the tile moved by a tap, pixels × inputs, and of the weights of that tap, inputs ×
outputs. Tensor cores multiply blocks of 16, so 6 or 12 channels are filled up with zeros, by masks and in the packed weights;
nothing else in memory is wider than it was.

Weights are packed as (tap, in, out) in the dtype of the products, those of all networks of a branch by one small kernel, so
that every load of them is 16 bytes without a mask. As they lie, (out, in, tap), a lane would read every ninth number, and with
the inputs adjacent 6 of them are no 16 bytes. Outputs are shift and raw of an affine map, interleaved; packed, all shifts are
ahead of all raws, so that a program has the two of a channel in the same place of two sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import at, channel_tile, launch, load, store
from ncsr_fast.layout import in_memory

# Sizes of the tiles. Chosen for instructions a pixel, registers and spills by the ahead-of-time report
# (ncsr_fast.kernels.ahead_of_time), never timed: no GPU yet.
COLUMNS = 16  # of a tile of pixels
PIXELS = 128  # of a tile, at most
INPUTS = 16  # of z1 at once; 32 and 64 need more instructions for 48
HIDDEN = 64  # of h2 computed at once, in the product with w2
HIDDEN_READ = 32  # of h2 at once, by what convolves it; 64 need more registers and instructions
PAIRS = 64  # of outputs, of a program, at most
PACKED = 1024  # weights that a program packs, 8 a thread
# By how numbers are multiplied
SUMS = {"half": 8192, "tf32": 8192, "ieee": 4096}  # of a program at most, pixels × channels; half and ieee spill twice as many
OPTIONS = {"half": {"num_warps": 4}, "tf32": {"num_warps": 8}, "ieee": {"num_warps": 8, "num_stages": 1}}


@triton.jit
def unpaired(o, count, PADDED: tl.constexpr, PAIRED: tl.constexpr):
    """The channel at o of PADDED packed ones, and whether it is one of `count`; PAIRED: the even ones, then the odd ones."""
    if PAIRED:
        o = o % (PADDED // 2) * 2 + o // (PADDED // 2)
    return o.to(tl.int64), o < count


@triton.jit(do_not_specialize=["networks"])
def pack_networks_kernel(weights, networks, BLOCK: tl.constexpr):
    """Weights as (network, tap, in, out) in the dtype of the products, filled up with zeros.

    weights: of each its pointer, its strides of a network, an output, an input, a row and a column, and the pointer of the
        packed one; then the taps, the outputs, as many packed, and whether in pairs; and the same of the inputs
    """
    i = tl.program_id(0)
    for i_w in tl.static_range(len(weights)):
        p_weight, by_network, by_out, by_in, by_row, by_column, p_packed = weights[i_w][:7]
        TAPS, outputs, OUTS, OUT_PAIRS, inputs, INS, IN_PAIRS = weights[i_w][7:]
        n = networks * (TAPS * INS * OUTS)
        blocks = tl.cdiv(n, BLOCK)
        if (i >= 0) & (i < blocks):
            o = i * BLOCK + tl.arange(0, BLOCK)
            o_tap = (o // (OUTS * INS) % TAPS).to(tl.int64)
            o_out, m_out = unpaired(o % OUTS, outputs, OUTS, OUT_PAIRS)
            o_in, m_in = unpaired(o // OUTS % INS, inputs, INS, IN_PAIRS)
            p = p_weight + (o // (TAPS * INS * OUTS)).to(tl.int64) * by_network + o_out * by_out + o_in * by_in
            b = tl.load(p + o_tap // 3 * by_row + o_tap % 3 * by_column, mask=m_out & m_in & (o < n), other=0.0)
            tl.store(p_packed + o, b.to(p_packed.dtype.element_ty), mask=o < n)
        i -= blocks


@triton.jit
def rectangle(i_b, i_p, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile i_p of a sample, of ROWS × COLUMNS pixels, as `pixel_tile` has them."""
    across, o = tl.cdiv(width, COLUMNS), tl.arange(0, ROWS * COLUMNS)[:, None]
    o_row, o_column = (i_p // across * ROWS).to(tl.int32), (i_p % across * COLUMNS).to(tl.int32)
    return pixels_at(i_b, o_row + o // COLUMNS, o_column + o % COLUMNS, height, width)


@triton.jit
def pixels_at(i_b, o_row, o_column, height, width):
    """The pixels of a sample at these rows and columns, int32, as `pixel_tile` has them; those outside the image are masked."""
    m = (o_row >= 0) & (o_row < height) & (o_column >= 0) & (o_column < width)
    o_row, o_column = o_row.to(tl.int64), o_column.to(tl.int64)
    o_p = o_row * width + o_column
    return i_b, o_row, o_column, m, o_p, i_b * height * width + o_p


@triton.jit
def moved(pixel, i_tap, height, width, pitch=None):
    """The pixels a tap away, 0 to 8 row by row; those outside the image are masked, by comparisons of 32 bits.

    pitch: pixels of memory from a row to the next, None for the width
    """
    down, right = i_tap // 3 - 1, i_tap % 3 - 1
    o_row, o_column = pixel[1].to(tl.int32) + down, pixel[2].to(tl.int32) + right
    m = pixel[3] & (o_row >= 0) & (o_row < height) & (o_column >= 0) & (o_column < width)
    further = down * (width if pitch is None else pitch) + right
    return pixel[0], o_row.to(tl.int64), o_column.to(tl.int64), m, pixel[4] + further, pixel[5] + further


@triton.jit
def add_convolved(
    acc,  # (pixels, outputs of the block)
    paired,  # as acc, or None
    x,  # (B, channels, H, W)
    p_weight,  # packed: (9, BLOCKS_K·BLOCK_K, OUTS)
    pixel,
    o_n,
    height,
    width,
    channels: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    pitch=None,  # as `moved` has it
):
    """acc + weight ∗ x at the pixels, of the packed outputs o_n, and `paired` + those OUTS/2 further; x is rounded to the
    dtype of the weight."""
    o_row = tl.trans(channel_tile(0, BLOCK_K))
    for i in tl.range(9 * BLOCKS_K, loop_unroll_factor=9 * BLOCKS_K if UNROLLED else 1):
        o_k = channel_tile(i % BLOCKS_K, BLOCK_K)
        near = moved(pixel, i // BLOCKS_K, height, width, pitch)
        b_x = tl.load(at(x, near, o_k), mask=near[3] & (o_k < channels), other=0.0).to(p_weight.dtype.element_ty)
        p = p_weight + (i * BLOCK_K + o_row) * OUTS + o_n
        acc = tl.dot(b_x, tl.load(p), acc, input_precision=PRECISION)
        if paired is not None:
            paired = tl.dot(b_x, tl.load(p + OUTS // 2), paired, input_precision=PRECISION)
    return acc, paired


@triton.jit
def relu(b):
    return tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_bias(b, p_bias, o_n, m_n):
    return b + tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)


@triton.jit
def store_hidden(
    z1,  # (B, C, H, W) or None
    pre,  # (B, hidden, H, W)
    p_w1,  # packed
    p_w2,  # packed
    p_b2,  # (hidden,)
    h1,  # (B, hidden, H, W) or None
    h2,  # (B, hidden, H, W)
    pixel,
    stored,  # the same pixels in the memory of h2
    height,
    width,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    HS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """h1 = relu(w1 ∗ z1 + pre), stored if wanted, and h2 = relu(w2 · h1 + b2) of a tile of pixels, BLOCK_N channels at once.

    Beyond `hidden` h1 is made zero: of an infinite z1 the sum there is NaN.
    """
    o_c = channel_tile(0, HS)
    b_h1 = load(pre, pixel, o_c, o_c < hidden)
    if z1 is not None:
        b_h1, _ = add_convolved(
            b_h1, None, z1, p_w1, pixel, o_c, height, width, channels, HS, BLOCK_K, BLOCKS_K, PRECISION, UNROLLED
        )
    b_h1 = tl.where(o_c < hidden, relu(b_h1), 0.0).to(p_w2.dtype.element_ty)
    if h1 is not None:
        store(h1, pixel, o_c, b_h1, o_c < hidden)
    for i_n in tl.static_range(HS // BLOCK_N):
        o_n = channel_tile(i_n, BLOCK_N)
        b_w2 = tl.load(p_w2 + tl.trans(o_c) * HS + o_n)
        b_h2 = relu(add_bias(tl.dot(b_h1, b_w2, input_precision=PRECISION), p_b2, o_n, o_n < hidden))
        store(h2, stored, o_n, b_h2, o_n < hidden)


class Packed(NamedTuple):
    """The weights of networks as the kernels read them, in the dtype of the products; transposed, with the last two axes
    exchanged, as those of the backward pass do."""

    w1: Tensor  # (K, 9, C filled up, hidden filled up); of networks that do not read the state C is 0
    w2: Tensor  # (K, 1, hidden filled up, hidden filled up)
    w3: Tensor  # (K, 9, hidden filled up, outputs filled up): the even outputs, then the odd ones; not if transposed


def step_network_weights(
    w1: Tensor | None, w2: Tensor, w3: Tensor, dtype: torch.dtype, transposed: bool = False
) -> tuple[Tensor, ...]:
    """As the reference's: the fields of `Packed`, by one launch."""
    (networks, hidden), outputs, channels = w2.shape[:2], w3.shape[1], 0 if w1 is None else w1.shape[2]
    # of an axis: its channels, as many packed, and whether they are paired
    state, inner = (channels, triton.cdiv(channels, INPUTS) * INPUTS, False), (hidden, block(hidden), False)
    if transposed:
        outs = outputs, triton.cdiv(outputs, INPUTS) * INPUTS, False
        weights = [None if weight is None else weight.transpose(1, 2) for weight in (w1, w2, w3)]
        jobs = list(zip(weights, (9, 1, 9), (state, inner, inner), (inner, inner, outs)))
    else:
        pairs = outputs, 2 * padded_pairs(outputs), True
        jobs = [(w1, 9, inner, state), (w2, 1, inner, inner), (w3, 9, pairs, inner)]
    packed = [torch.empty(networks, taps, ins[1], outs[1], dtype=dtype, device=w2.device) for _, taps, outs, ins in jobs]
    written = [(*job, into) for job, into in zip(jobs, packed) if into.numel()]
    if written:
        launch(
            pack_networks_kernel,
            sum(triton.cdiv(into.numel(), PACKED) for *_, into in written),
            w2.device,
            weights=tuple(_weight(*job) for job in written),
            networks=networks,
            BLOCK=PACKED,
        )
    return tuple(packed)


def _weight(weight: Tensor, taps: int, outs: tuple, ins: tuple, packed: Tensor) -> tuple:
    """A weight as `pack_networks_kernel` takes it."""
    weight = in_memory(weight)
    return weight, *weight.stride(), packed, *map(tl.constexpr, (taps, *outs, *ins))


def tiling(kind: str, height: int, width: int, channels: int) -> tuple[int, dict[str, int | str | bool]]:
    """Tiles of a sample, and the options of a kernel whose programs have the sums of so many channels."""
    rows = max(16, min(PIXELS, SUMS[kind] // channels)) // COLUMNS
    products = {"PRECISION": "tf32" if kind == "tf32" else "ieee", "UNROLLED": kind != "ieee"}
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, COLUMNS)
    return tiles, {"ROWS": rows, "COLUMNS": COLUMNS, **products, **OPTIONS[kind]}


def block(channels: int) -> int:
    """The least block that holds so many channels, of those that tensor cores multiply."""
    return max(16, triton.next_power_of_2(channels))


def padded_pairs(outputs: int) -> int:
    """Pairs of so many outputs, filled up to whole blocks of a program."""
    pairs = triton.cdiv(outputs, 2)
    return triton.cdiv(pairs, block_of_pairs(outputs)) * block_of_pairs(outputs)


def block_of_pairs(outputs: int) -> int:
    """Pairs of outputs of a program."""
    return min(PAIRS, block(triton.cdiv(outputs, 2)))
