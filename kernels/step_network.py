"""The network of an injector or a coupling in two kernels, its hidden layers in between in registers and once in memory.

    h1 = relu(w1 ∗ z1 + pre),   h2 = relu(w2 · h1 + b2)      `hidden`: a program has the sums of all hidden channels of a tile,
                                                             which start as pre, and multiplies their relu by w2 as it is
    h  = w3 ∗ h2 + b3                                        `output`

A 3×3 convolution is nine products (`_step_network`). Those of float16 and bfloat16 are of tensor cores with sums in float32,
those of float32 too in TF32 where the caller permits it, and otherwise true float32.

* A tile is a rectangle of 8×16 pixels: with its border it is 1.4 tiles, a row of 128 pixels with its own is 3. The nine reads
  of a pixel are by ordinary loads, which go through the cache of a multiprocessor, unlike asynchronous ones of 16 bytes. The
  taps are unrolled, and the compiler issues the loads of the next one before the products of the last.
* z1 is read as it lies and rounded in the kernel: the first channels of a channels-last float32 state need no copy.
* The samples of a tile are neighbours in the grid: a pre that they share is read from memory once, then from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, channel_tile, check_dtype, dense, from_channel, image, launch, program, store
from ncsr_fast.kernels._step_network import (
    HIDDEN,
    HIDDEN_READ,
    INPUTS,
    Packed,
    add_bias,
    add_convolved,
    block_of_pairs,
    rectangle,
    step_network_weights,
    store_hidden,
    tiling,
)
from ncsr_fast.layout import empty_channels_last


@triton.jit(do_not_specialize=["batch", "height", "width"])
def hidden_kernel(
    z1,  # (B, C, H, W) or None
    pre,  # (B, K·hidden, H, W)
    p_w1,  # packed, of K networks; 1 where there is z1
    p_w2,
    p_b2,  # (K, hidden)
    h1,  # (B, hidden, H, W) or None
    h2,  # (B, K·hidden, H, W)
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
    """`store_hidden` of a tile of pixels of a network; the samples of a tile are neighbours."""
    i = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    i_network = i // batch // n_tiles
    pixel = rectangle(i % batch, i // batch % n_tiles, height, width, ROWS, COLUMNS)
    pre, h2 = from_channel(pre, i_network * hidden), from_channel(h2, i_network * hidden)
    store_hidden(
        z1, pre, p_w1, p_w2 + i_network * HS * HS, p_b2 + i_network * hidden, h1, h2, pixel, pixel, height, width,
        channels, hidden, PRECISION, UNROLLED, HS, BLOCK_N, BLOCK_K, BLOCKS_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "height", "width"])
def output_kernel(
    h2,  # (B, K·hidden, H, W)
    p_w3,  # packed, of K networks
    p_b3,  # (K, outputs)
    h,  # (K·B, outputs, H, W)
    batch,
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
    """h = w3 ∗ h2 + b3 of a tile of pixels and pairs of outputs of a network."""
    i_h, i_p, i_n = program(tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS), OUTS // (2 * BLOCK_N))
    i_network = i_h // batch
    pixel = rectangle(i_h % batch, i_p, height, width, ROWS, COLUMNS)
    h2, p_w3 = from_channel(h2, i_network * hidden), p_w3 + i_network * (9 * BLOCKS_K * BLOCK_K * OUTS)
    b_zero = tl.zeros([ROWS * COLUMNS, BLOCK_N], tl.float32)
    o_n = channel_tile(i_n, BLOCK_N)
    b_even, b_odd = add_convolved(
        b_zero, b_zero, h2, p_w3, pixel, o_n, height, width, hidden, OUTS, BLOCK_K, BLOCKS_K, PRECISION, UNROLLED
    )
    o_h = channel_tile(i_n, 2 * BLOCK_N)
    b_h = add_bias(tl.interleave(b_even, b_odd), p_b3 + i_network * outputs, o_h, o_h < outputs)
    store(h, rectangle(i_h, i_p, height, width, ROWS, COLUMNS), o_h, b_h, o_h < outputs)


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
    packed: Sequence[Tensor] = (),
) -> Tensor:
    """`step_network_forward` of the reference."""
    return _layers(z1, pre, w1, w2, b2, w3, b3, tf32, packed, None)[1]


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
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`step_network_layers` of the reference."""
    h1 = _empty(pre, pre.shape[1])
    return h1, *_layers(z1, pre, w1, w2, b2, w3, b3, tf32, packed, h1)


def step_network_tails(
    pre: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, *, tf32: bool = False, packed: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """As the reference's: two launches."""
    check_dtype(pre, "pre")
    networks, outputs, (batch, channels, height, width) = len(w2), w3.shape[1], pre.shape
    h2, h = _empty(pre, channels), empty_channels_last((networks * batch, outputs, height, width), pre)
    if h.numel():
        kind, weights = arithmetic(pre, tf32), Packed(*(packed or step_network_weights(None, w2, w3, pre.dtype)))
        launch_hidden(None, pre, weights, b2, None, h2, kind, networks)
        _launch_output(h2, weights, b3, h, kind, networks)
    return h.split(batch)


def _layers(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    tf32: bool,
    packed: Sequence[Tensor],
    h1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels: h2 and h, channels-last; h1 is written, if given."""
    check_dtype(pre, "pre")
    h2, h = _empty(pre, pre.shape[1]), _empty(pre, w3.shape[0])
    if h2.numel():
        kind, weights = arithmetic(pre, tf32), packed_network(w1, w2, w3, pre.dtype, packed)
        launch_hidden(z1, pre, weights, b2, h1, h2, kind)
        _launch_output(h2, weights, b3, h, kind)
    return h2, h


def packed_network(
    w1: Tensor | None, w2: Tensor, w3: Tensor, dtype: torch.dtype, packed: Sequence[Tensor], transposed: bool = False
) -> Packed:
    """The weights of a network as the kernels read them: packed already, or now."""
    if not packed:
        stacks = step_network_weights(None if w1 is None else w1[None], w2[None], w3[None], dtype, transposed)
        packed = [stack[0] for stack in stacks]
    return Packed(*packed)


def launch_hidden(
    z1: Tensor | None,
    pre: Tensor,
    weights: Packed,
    b2: Tensor,
    h1: Tensor | None,
    h2: Tensor,
    kind: str,
    networks: int = 1,
) -> None:
    """Write h1, if given, and h2."""
    batch, channels, height, width = pre.shape
    hs = weights.w2.shape[-1]
    tiles, options = tiling(kind, height, width, hs)
    launch(
        hidden_kernel,
        networks * tiles * batch,
        pre.device,
        z1=image(z1),
        pre=image(pre),
        p_w1=weights.w1,
        p_w2=weights.w2,
        p_b2=dense(b2),
        h1=image(h1),
        h2=image(h2),
        batch=batch,
        height=height,
        width=width,
        channels=0 if z1 is None else z1.shape[1],
        hidden=channels // networks,
        HS=hs,
        BLOCK_N=min(HIDDEN, hs),
        BLOCK_K=INPUTS,
        BLOCKS_K=weights.w1.shape[-2] // INPUTS,
        **options,
    )


def _launch_output(h2: Tensor, weights: Packed, b3: Tensor, h: Tensor, kind: str, networks: int = 1) -> None:
    """Write h."""
    (batch, channels, height, width), outputs, (hs, outs) = h2.shape, h.shape[1], weights.w3.shape[-2:]
    block_n, block_k = block_of_pairs(outputs), min(HIDDEN_READ, hs)
    tiles, options = tiling(kind, height, width, 2 * block_n)
    launch(
        output_kernel,
        networks * batch * tiles * (outs // (2 * block_n)),
        h.device,
        h2=image(h2),
        p_w3=weights.w3,
        p_b3=dense(b3),
        h=image(h),
        batch=batch,
        height=height,
        width=width,
        hidden=channels // networks,
        outputs=outputs,
        OUTS=outs,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCKS_K=hs // block_k,
        **options,
    )


def _empty(pre: Tensor, channels: int) -> Tensor:
    """A channels-last image like pre of so many channels."""
    return empty_channels_last((pre.shape[0], channels, *pre.shape[2:]), pre)
