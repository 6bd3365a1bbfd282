"""The gradients of the networks of injectors and couplings with respect to their inputs, in two kernels.

From dh, the gradient of h = w3 ∗ h2 + b3, with h2 = relu(w2 · h1 + b2) and h1 = relu(w1 ∗ z1 + pre):

    dh2  = (w3ᵀ ∗ dh) ⊙ [h2 > 0]      `hidden_backward`: a program has the sums of all hidden channels of a tile of pixels,
    dpre = (w2ᵀ · dh2) ⊙ [h1 > 0]     stores them, for the gradient of w3, and multiplies them by w2ᵀ as they are
    dz1 += w1ᵀ ∗ dpre                 `state_backward`: is added to the gradient of the state that z1 is a part of

The convolution with a transposed weight takes its taps in reverse and sums over its outputs: for that, weights are packed as
(tap, out, in). What the forward kernels say of tiles, of products and of numbers of channels that are filled up holds here;
`hidden_backward` runs several networks in one grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, check_dtype, image, launch, load, program, store
from ncsr_fast.kernels._networks import images, one_of
from ncsr_fast.kernels._step_network import INPUTS, moved, rectangle, tiling
from ncsr_fast.kernels.step_network import HIDDEN, launch_hidden, packed_network
from ncsr_fast.layout import empty_channels_last, writable

OUTPUTS_READ = 32  # of dh at once, at most


@triton.jit
def add_transposed(
    acc,  # (pixels, inputs of the block)
    dy,  # (B, outputs, H, W)
    p_weight,  # packed: (9, BLOCKS_K·BLOCK_K, INS)
    pixel,
    o_n,
    height,
    width,
    outputs: tl.constexpr,
    INS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """acc + weightᵀ ∗ dy at the pixels, of the inputs o_n; dy is rounded to the dtype of the weight."""
    o_row = tl.trans(channel_tile(0, BLOCK_K))
    for i in tl.range(9 * BLOCKS_K, loop_unroll_factor=9 * BLOCKS_K if UNROLLED else 1):
        o_k = channel_tile(i % BLOCKS_K, BLOCK_K)
        near = moved(pixel, 8 - i // BLOCKS_K, height, width)
        b_dy = tl.load(at(dy, near, o_k), mask=near[3] & (o_k < outputs), other=0.0).to(p_weight.dtype.element_ty)
        b_weight = tl.load(p_weight + (i * BLOCK_K + o_row) * INS + o_n)
        acc = tl.dot(b_dy, b_weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gated(b, layer, pixel, o_c, m_c):
    """b where a layer, behind its ReLU, is positive or NaN; else zero."""
    return tl.where(load(layer, pixel, o_c, m_c) <= 0.0, 0.0, b)


@triton.jit(do_not_specialize=["batch", "height", "width"])
def hidden_backward_kernel(
    p_dh,  # of each network, (B, outputs, H, W)
    dh_strides,
    p_h1,  # (B, hidden, H, W)
    h1_strides,
    p_h2,  # (B, hidden, H, W)
    h2_strides,
    p_dh2,  # (B, hidden, H, W)
    dh2_strides,
    p_dpre,  # (B, hidden, H, W)
    dpre_strides,
    p_w2,  # of each network, packed: (1, HS, HS)
    p_w3,  # (9, BLOCKS_K·BLOCK_K, HS)
    batch,
    height,
    width,
    hidden: tl.constexpr,
    outputs: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """dh2 and dpre of a tile of pixels, the latter BLOCK_N channels at once."""
    i = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    i_network, i = i // (tiles * batch), i % (tiles * batch)
    dh = (one_of(p_dh, i_network),) + dh_strides
    h1 = (one_of(p_h1, i_network),) + h1_strides
    h2 = (one_of(p_h2, i_network),) + h2_strides
    dh2 = (one_of(p_dh2, i_network),) + dh2_strides
    dpre = (one_of(p_dpre, i_network),) + dpre_strides
    p_w2, p_w3 = one_of(p_w2, i_network), one_of(p_w3, i_network)
    pixel = rectangle(i % batch, i // batch, height, width, ROWS, COLUMNS)
    o_c = channel_tile(0, HS)
    acc = tl.zeros([ROWS * COLUMNS, HS], tl.float32)
    acc = add_transposed(acc, dh, p_w3, pixel, o_c, height, width, outputs, HS, BLOCK_K, BLOCKS_K, PRECISION, UNROLLED)
    b_dh2 = gated(acc, h2, pixel, o_c, o_c < hidden).to(p_w2.dtype.element_ty)
    store(dh2, pixel, o_c, b_dh2, o_c < hidden)
    for i_n in tl.static_range(HS // BLOCK_N):
        o_n = channel_tile(i_n, BLOCK_N)
        b_w2 = tl.load(p_w2 + tl.trans(o_c) * HS + o_n)
        b_dpre = tl.dot(b_dh2, b_w2, input_precision=PRECISION)
        store(dpre, pixel, o_n, gated(b_dpre, h1, pixel, o_n, o_n < hidden), o_n < hidden)


@triton.jit(do_not_specialize=["height", "width"])
def state_backward_kernel(
    dpre,  # (B, hidden, H, W)
    p_w1,  # packed: (9, BLOCKS_K·BLOCK_K, CS)
    dz1,  # (B, C, H, W)
    height,
    width,
    hidden: tl.constexpr,
    channels: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """dz1 + w1ᵀ ∗ dpre of a tile of pixels and channels."""
    i_b, i_p, i_n = program(tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS), CS // BLOCK_N)
    pixel = rectangle(i_b, i_p, height, width, ROWS, COLUMNS)
    o_n = channel_tile(i_n, BLOCK_N)
    acc = load(dz1, pixel, o_n, o_n < channels)
    acc = add_transposed(acc, dpre, p_w1, pixel, o_n, height, width, hidden, CS, BLOCK_K, BLOCKS_K, PRECISION, UNROLLED)
    store(dz1, pixel, o_n, acc, o_n < channels)


def step_network_hidden(
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
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    check_dtype(pre, "pre")
    h1, h2 = (empty_channels_last(pre.shape, pre) for _ in range(2))
    if h1.numel():
        weights = packed_network(w1, w2, w3, pre.dtype, packed)
        launch_hidden(z1, pre, weights, b2, h1, h2, arithmetic(pre, tf32))
    return h1, h2


def step_network_backward(
    dh: Sequence[Tensor],
    h1: Sequence[Tensor],
    h2: Sequence[Tensor],
    networks: Sequence[tuple],
    dpre: Sequence[Tensor],
    dz1: Sequence[Tensor | None],
    *,
    tf32: bool = False,
    packed: Sequence[Sequence[Tensor]] = (),
) -> list[Tensor]:
    """As the reference's. What is added to is written by the last kernels alone."""
    check_dtype(h2[0], "h2")
    dh2 = [empty_channels_last(x.shape, x) for x in h2]
    if h2[0].numel() == 0:
        return dh2
    kind = arithmetic(h2[0], tf32)
    packed = packed or [packed_network(w1, w2, w3, h2[0].dtype, (), transposed=True) for w1, w2, _, w3, _ in networks]
    p_w1, p_w2, p_w3 = zip(*packed)
    _launch_hidden_backward(dh, h1, h2, dh2, dpre, p_w2, p_w3, kind)
    for own_dpre, own_w1, own_dz1 in zip(dpre, p_w1, dz1):
        if own_dz1 is not None:
            _launch_state_backward(own_dpre, own_w1, own_dz1, kind)
    return dh2


def _launch_hidden_backward(
    dh: Sequence[Tensor],
    h1: Sequence[Tensor],
    h2: Sequence[Tensor],
    dh2: Sequence[Tensor],
    dpre: Sequence[Tensor],
    p_w2: Sequence[Tensor],
    p_w3: Sequence[Tensor],
    kind: str,
) -> None:
    """Write dh2 and dpre."""
    batch, hidden, height, width = h2[0].shape
    outs, hs = p_w3[0].shape[1:]
    tiles, options = tiling(kind, height, width, hs)
    block_k = OUTPUTS_READ if outs % OUTPUTS_READ == 0 else INPUTS
    launch(
        hidden_backward_kernel,
        len(dh) * tiles * batch,
        h2[0].device,
        **images("dh", dh),
        **images("h1", h1),
        **images("h2", h2),
        **images("dh2", dh2, written=True),
        **images("dpre", [writable(x) for x in dpre], written=True),
        p_w2=tuple(p_w2),
        p_w3=tuple(p_w3),
        batch=batch,
        height=height,
        width=width,
        hidden=hidden,
        outputs=dh[0].shape[1],
        HS=hs,
        BLOCK_N=min(HIDDEN, hs),
        BLOCK_K=block_k,
        BLOCKS_K=outs // block_k,
        **options,
    )


def _launch_state_backward(dpre: Tensor, p_w1: Tensor, dz1: Tensor, kind: str) -> None:
    """Add to dz1."""
    batch, hidden, height, width = dpre.shape
    channels, (_, hs, inputs) = dz1.shape[1], p_w1.shape
    block_n = next(block for block in (64, 32, INPUTS) if inputs % block == 0)
    tiles, options = tiling(kind, height, width, block_n)
    block_k = min(OUTPUTS_READ, hs)
    launch(
        state_backward_kernel,
        batch * tiles * (inputs // block_n),
        dpre.device,
        dpre=image(dpre),
        p_w1=p_w1,
        dz1=image(writable(dz1)),
        height=height,
        width=width,
        hidden=hidden,
        channels=channels,
        CS=inputs,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCKS_K=hs // block_k,
        **options,
    )
