"""The network of an injector or a coupling in two kernels, its hidden layers in between in registers and once in memory.

    h1 = relu(w1 ∗ z1 + pre),   h2 = relu(w2 · h1 + b2)      `hidden`: a program has the sums of all hidden channels of a tile,
                                                             which start as pre, and multiplies their relu by w2 as it is
    h  = w3 ∗ h2 + b3                                        `output`

A 3×3 convolution is nine products: of the tile moved by a tap, pixels × inputs, and of the weights of that tap, inputs ×
outputs. Those of float16 and bfloat16 are of tensor cores with sums in float32, those of float32 too in TF32 where the caller
permits it, and otherwise true float32. Tensor cores multiply blocks of 16, so 6 or 12 channels are filled up with zeros, by
masks and in the packed weights; nothing in memory is wider than it was.

* A tile is a rectangle of 8×16 pixels: with its border it is 1.4 tiles, a row of 128 pixels with its own is 3. The nine reads
  of a pixel are by ordinary loads, which go through the cache of a multiprocessor, unlike asynchronous ones of 16 bytes. The
  taps are unrolled, and the compiler issues the loads of the next one before the products of the last.
* z1 is read as it lies and rounded in the kernel: the first channels of a channels-last float32 state need no copy.
* The samples of a tile are neighbours in the grid: a pre that they share is read from memory once, then from a cache.
* Weights are packed as (tap, in, out) in the dtype of the products, once a call by one small kernel, so that every load of
  them is 16 bytes without a mask. As they lie, (out, in, tap), a lane would read every ninth number, and with the inputs
  adjacent 6 of them are no 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, check_dtype, dense, image, launch, load, program, store
from ncsr_fast.layout import empty_channels_last, in_memory

# Sizes of the tiles. Chosen for instructions a pixel, registers and spills by the ahead-of-time report
# (ncsr_fast.kernels.ahead_of_time), never timed: no GPU yet.
COLUMNS = 16  # of a tile of pixels
PIXELS = 128  # of a tile, at most
INPUTS = 16  # of z1 at once; 32 and 64 need more instructions for 48
HIDDEN = 64  # of h2 computed at once, in the product with w2
HIDDEN_READ = 32  # of h2 at once, by `output`; 64 need more registers and instructions
OUTPUTS = 128  # of a program, at most
PACKED = 1024  # weights that a program packs, 8 a thread
# By how numbers are multiplied
SUMS = {"half": 8192, "tf32": 8192, "ieee": 4096}  # of a program at most, pixels × channels; half and ieee spill twice as many
OPTIONS = {"half": {"num_warps": 4}, "tf32": {"num_warps": 8}, "ieee": {"num_warps": 8, "num_stages": 1}}


@triton.jit
def pack(weight, p_packed, i, inputs, outputs, TAPS: tl.constexpr, INS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Block i of a weight as (tap, in, out), with zeros from `inputs` to INS and from `outputs` to OUTS."""
    o = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_out, o_in, o_tap = o % OUTS, o // OUTS % INS, o // (OUTS * INS)
    p = weight[0] + o_out * weight[1] + o_in * weight[2] + o_tap // 3 * weight[3] + o_tap % 3 * weight[4]
    b = tl.load(p, mask=(o_out < outputs) & (o_in < inputs) & (o_tap < TAPS), other=0.0)
    tl.store(p_packed + o, b.to(p_packed.dtype.element_ty), mask=o_tap < TAPS)


@triton.jit
def pack_network_kernel(
    w1,  # (hidden, C, 3, 3) or None
    w2,  # (hidden, hidden, 1, 1)
    w3,  # (outputs, hidden, 3, 3)
    p_w1,  # (9, CS, HS)
    p_w2,  # (HS, HS)
    p_w3,  # (9, HS, OUTS)
    channels,
    hidden,
    outputs,
    CS: tl.constexpr,
    HS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights as (tap, in, out) in the dtype of the products, filled up with zeros."""
    i = tl.program_id(0)
    first = tl.cdiv(9 * CS * HS, BLOCK)
    second = first + tl.cdiv(HS * HS, BLOCK)
    if i < first:
        if w1 is not None:
            pack(w1, p_w1, i, channels, hidden, 9, CS, HS, BLOCK)
    elif i < second:
        pack(w2, p_w2, i - first, hidden, hidden, 1, HS, HS, BLOCK)
    else:
        pack(w3, p_w3, i - second, hidden, outputs, 9, HS, OUTS, BLOCK)


@triton.jit
def rectangle(i_b, i_p, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile i_p of a sample, of ROWS × COLUMNS pixels, as `pixel_tile` has them."""
    across = tl.cdiv(width, COLUMNS)
    o = tl.arange(0, ROWS * COLUMNS)[:, None]
    o_row = (i_p // across * ROWS).to(tl.int32) + o // COLUMNS
    o_column = (i_p % across * COLUMNS).to(tl.int32) + o % COLUMNS
    m = (o_row < height) & (o_column < width)
    o_row, o_column = o_row.to(tl.int64), o_column.to(tl.int64)
    o_p = o_row * width + o_column
    return i_b, o_row, o_column, m, o_p, i_b * height * width + o_p


@triton.jit
def moved(pixel, i_tap, height, width):
    """The pixels a tap away, 0 to 8 row by row; those outside the image are masked, by comparisons of 32 bits."""
    down, right = i_tap // 3 - 1, i_tap % 3 - 1
    o_row, o_column = pixel[1].to(tl.int32) + down, pixel[2].to(tl.int32) + right
    m = pixel[3] & (o_row >= 0) & (o_row < height) & (o_column >= 0) & (o_column < width)
    further = down * width + right
    return pixel[0], o_row.to(tl.int64), o_column.to(tl.int64), m, pixel[4] + further, pixel[5] + further


@triton.jit
def add_convolved(
    acc,  # (pixels, outputs of the block)
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
):
    """acc + weight ∗ x at the pixels, of the outputs o_n; x is rounded to the dtype of the weight."""
    o_row = tl.trans(channel_tile(0, BLOCK_K))
    for i in tl.range(9 * BLOCKS_K, loop_unroll_factor=9 * BLOCKS_K if UNROLLED else 1):
        o_k = channel_tile(i % BLOCKS_K, BLOCK_K)
        near = moved(pixel, i // BLOCKS_K, height, width)
        b_x = tl.load(at(x, near, o_k), mask=near[3] & (o_k < channels), other=0.0).to(p_weight.dtype.element_ty)
        b_weight = tl.load(p_weight + (i * BLOCK_K + o_row) * OUTS + o_n)
        acc = tl.dot(b_x, b_weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def relu(b):
    return tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_bias(b, p_bias, o_n, m_n):
    return b + tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "height", "width"])
def hidden_kernel(
    z1,  # (B, C, H, W) or None
    pre,  # (B, hidden, H, W)
    p_w1,  # packed
    p_w2,  # packed
    p_b2,  # (hidden,)
    h1,  # (B, hidden, H, W) or None
    h2,  # (B, hidden, H, W)
    batch,
    height,
    width,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """h1 = relu(w1 ∗ z1 + pre), stored if wanted, and h2 = relu(w2 · h1 + b2) of a tile of pixels, BLOCK_N channels at once.

    Beyond `hidden` h1 is made zero: of an infinite z1 the sum there is NaN.
    """
    i = tl.program_id(0).to(tl.int64)
    pixel = rectangle(i % batch, i // batch, height, width, ROWS, COLUMNS)
    o_c = channel_tile(0, HS)
    b_h1 = load(pre, pixel, o_c, o_c < hidden)
    if z1 is not None:
        b_h1 = add_convolved(b_h1, z1, p_w1, pixel, o_c, height, width, channels, HS, BLOCK_K, BLOCKS_K, PRECISION, UNROLLED)
    b_h1 = tl.where(o_c < hidden, relu(b_h1), 0.0).to(p_w2.dtype.element_ty)
    if h1 is not None:
        store(h1, pixel, o_c, b_h1, o_c < hidden)
    for i_n in tl.static_range(HS // BLOCK_N):
        o_n = channel_tile(i_n, BLOCK_N)
        b_w2 = tl.load(p_w2 + tl.trans(o_c) * HS + o_n)
        b_h2 = relu(add_bias(tl.dot(b_h1, b_w2, input_precision=PRECISION), p_b2, o_n, o_n < hidden))
        store(h2, pixel, o_n, b_h2, o_n < hidden)


@triton.jit(do_not_specialize=["height", "width"])
def output_kernel(
    h2,  # (B, hidden, H, W)
    p_w3,  # packed
    p_b3,  # (outputs,)
    h,  # (B, outputs, H, W)
    height,
    width,
    hidden: tl.constexpr,
    outputs: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """h = w3 ∗ h2 + b3 of a tile of pixels and outputs."""
    i_b, i_p, i_n = program(tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS), OUTS // BLOCK_N)
    pixel = rectangle(i_b, i_p, height, width, ROWS, COLUMNS)
    o_n = channel_tile(i_n, BLOCK_N)
    b_h = add_convolved(
        tl.zeros([ROWS * COLUMNS, BLOCK_N], tl.float32),
        h2,
        p_w3,
        pixel,
        o_n,
        height,
        width,
        hidden,
        OUTS,
        BLOCK_K,
        BLOCKS_K,
        PRECISION,
        UNROLLED,
    )
    store(h, pixel, o_n, add_bias(b_h, p_b3, o_n, o_n < outputs), o_n < outputs)


def step_network_forward(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
) -> Tensor:
    """`step_network_forward` of the reference."""
    return _layers(z1, pre, w1, w2, b2, w3, b3, tf32, None)[1]


def step_network_layers(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`step_network_layers` of the reference."""
    h1 = _empty(pre, pre.shape[1])
    return h1, *_layers(z1, pre, w1, w2, b2, w3, b3, tf32, h1)


def _layers(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    tf32: bool,
    h1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels: h2 and h, channels-last; h1 is written, if given."""
    check_dtype(pre, "pre")
    h2, h = _empty(pre, pre.shape[1]), _empty(pre, w3.shape[0])
    if h2.numel():
        kind = arithmetic(pre, tf32)
        p_w1, p_w2, p_w3 = _packed(w1, w2, w3, pre.dtype)
        _launch_hidden(z1, pre, p_w1, p_w2, b2, h1, h2, kind)
        _launch_output(h2, p_w3, b3, h, kind)
    return h2, h


def _packed(w1: Tensor | None, w2: Tensor, w3: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Launch the packing: w1, w2 and w3 as (tap, in, out)."""
    channels, hidden, outputs = 0 if w1 is None else w1.shape[1], w2.shape[0], w3.shape[0]
    block_n = min(OUTPUTS, _block(outputs))
    inputs, hs, outs = triton.cdiv(channels, INPUTS) * INPUTS, _block(hidden), triton.cdiv(outputs, block_n) * block_n
    packed = [torch.empty(shape, dtype=dtype, device=w2.device) for shape in ((9, inputs, hs), (1, hs, hs), (9, hs, outs))]
    weights = [None if weight is None else (in_memory(weight), *weight.stride()) for weight in (w1, w2, w3)]
    launch(
        pack_network_kernel,
        sum(triton.cdiv(weight.numel(), PACKED) for weight in packed),
        w2.device,
        **dict(zip(("w1", "w2", "w3"), weights)),
        **dict(zip(("p_w1", "p_w2", "p_w3"), packed)),
        channels=channels,
        hidden=hidden,
        outputs=outputs,
        CS=inputs,
        HS=hs,
        OUTS=outs,
        BLOCK=PACKED,
    )
    return packed


def _launch_hidden(
    z1: Tensor | None, pre: Tensor, p_w1: Tensor, p_w2: Tensor, b2: Tensor, h1: Tensor | None, h2: Tensor, kind: str
) -> None:
    """Write h1, if given, and h2."""
    batch, hidden, height, width = pre.shape
    tiles, options = _options(kind, height, width, p_w2.shape[1])
    launch(
        hidden_kernel,
        tiles * batch,
        pre.device,
        z1=image(z1),
        pre=image(pre),
        p_w1=p_w1,
        p_w2=p_w2,
        p_b2=dense(b2),
        h1=image(h1),
        h2=image(h2),
        batch=batch,
        height=height,
        width=width,
        channels=0 if z1 is None else z1.shape[1],
        hidden=hidden,
        HS=p_w2.shape[1],
        BLOCK_N=min(HIDDEN, p_w2.shape[1]),
        BLOCK_K=INPUTS,
        BLOCKS_K=p_w1.shape[1] // INPUTS,
        **options,
    )


def _launch_output(h2: Tensor, p_w3: Tensor, b3: Tensor, h: Tensor, kind: str) -> None:
    """Write h."""
    batch, outputs, height, width = h.shape
    block_n, block_k = min(OUTPUTS, _block(outputs)), min(HIDDEN_READ, p_w3.shape[1])
    tiles, options = _options(kind, height, width, block_n)
    launch(
        output_kernel,
        batch * tiles * (p_w3.shape[2] // block_n),
        h.device,
        h2=image(h2),
        p_w3=p_w3,
        p_b3=dense(b3),
        h=image(h),
        height=height,
        width=width,
        hidden=h2.shape[1],
        outputs=outputs,
        OUTS=p_w3.shape[2],
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCKS_K=p_w3.shape[1] // block_k,
        **options,
    )


def _options(kind: str, height: int, width: int, channels: int) -> tuple[int, dict[str, int | str | bool]]:
    """Tiles of a sample, and the options of a kernel whose programs have the sums of so many channels."""
    rows = max(16, min(PIXELS, SUMS[kind] // channels)) // COLUMNS
    products = {"PRECISION": "tf32" if kind == "tf32" else "ieee", "UNROLLED": kind != "ieee"}
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, COLUMNS)
    return tiles, {"ROWS": rows, "COLUMNS": COLUMNS, **products, **OPTIONS[kind]}


def _block(channels: int) -> int:
    """The least block that holds so many channels, of those that tensor cores multiply."""
    return max(16, triton.next_power_of_2(channels))


def _empty(pre: Tensor, channels: int) -> Tensor:
    """A channels-last image like pre of so many channels."""
    return empty_channels_last((pre.shape[0], channels, *pre.shape[2:]), pre)
