"""The gradients of the networks of injectors and couplings with respect to their inputs, in two kernels.

From dh, the gradient of h = w3 ∗ h2 + b3, with h2 = relu(w2 · h1 + b2) and h1 = relu(w1 ∗ z1 + pre):

    dh2  = (w3ᵀ ∗ dh) ⊙ [h2 > 0]      `hidden_backward`: a program has the sums of all hidden channels of a tile of pixels,
    dpre = (w2ᵀ · dh2) ⊙ [h1 > 0]     and multiplies them by w2ᵀ as they are
    dw2  = dh2ᵀ · h1,   db2 = Σ dh2   over its tile; the sums over tiles are `_network_weight`'s
    dz1 += w1ᵀ ∗ dpre                 `state_backward`: is added to the gradient of the state that z1 is a part of

h1 and dh2 are thus never in memory: of a network's hidden layers and their gradients only h2 and dpre are. Those of more than
FUSED channels leave a program no registers for dw2: h1 and dh2 are then stored.

The convolution with a transposed weight takes its taps in reverse and sums over its outputs: for that, weights are packed as
(tap, out, in). What the forward kernels say of tiles, of products and of numbers of channels that are filled up holds here;
`hidden_backward` runs several networks in one grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, check_dtype, dense, image, launch, load, program, store
from ncsr_fast.kernels._networks import images, one_of
from ncsr_fast.kernels._step_network import (
    INPUTS,
    Packed,
    add_bias,
    add_convolved,
    block,
    moved,
    rectangle,
    relu,
    step_network_weights,
    tiling,
)
from ncsr_fast.kernels.step_network import launch_hidden
from ncsr_fast.layout import empty_channels_last, writable
from ncsr_fast.ops.network_gradients import Layers

OUTPUTS_READ = 32  # of dh at once, at most
# Channels, filled up, of hidden layers that are recomputed, and whose dw2 is summed, in the same kernel: those of the published
# models, for which the ahead-of-time report has no spills
FUSED = 64


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


@triton.jit(do_not_specialize=["batch", "height", "width"])
def hidden_backward_kernel(
    p_dh,  # of each network, (B, outputs, H, W)
    dh_strides,
    p_z1,  # (B, C, H, W), or None
    z1_strides,
    p_pre,  # (B, hidden, H, W), or None: h1 and h2 are read
    pre_strides,
    p_h1,  # (B, hidden, H, W), or pre where h1 is its positive part; None: recomputed
    h1_strides,
    p_h2,  # (B, hidden, H, W)
    h2_strides,
    p_dh2,  # (B, hidden, H, W), or None: not written
    dh2_strides,
    p_dpre,  # (B, hidden, H, W)
    dpre_strides,
    p_sums,  # of each network, (tiles, hidden · hidden + hidden): of dw2 and db2, or None
    p_w1,  # packed: (9, CS, HS)
    p_w2,  # (1, HS, HS)
    p_b2,  # (hidden,)
    p_w2_transposed,  # (1, HS, HS)
    p_w3_transposed,  # (9, BLOCKS_K·BLOCK_K, HS)
    batch,
    height,
    width,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    outputs: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
):
    """dpre of a tile of pixels, h1 and h2 ahead of it as `hidden_kernel` has them; and dh2, or what it sums to."""
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS) * batch
    i = tl.program_id(0).to(tl.int64)
    n, i = i // tiles, i % tiles
    dh, h2 = (one_of(p_dh, n),) + dh_strides, (one_of(p_h2, n),) + h2_strides
    dpre = (one_of(p_dpre, n),) + dpre_strides
    o_c = channel_tile(0, HS)
    o_w2 = tl.trans(o_c) * HS + o_c
    p_w3 = one_of(p_w3_transposed, n)
    pixel = rectangle(i % batch, i // batch, height, width, ROWS, COLUMNS)
    b_dh2 = tl.zeros([ROWS * COLUMNS, HS], tl.float32)
    b_dh2 = add_transposed(b_dh2, dh, p_w3, pixel, o_c, height, width, outputs, HS, BLOCK_K, BLOCKS_K, PRECISION, UNROLLED)
    if p_pre is None:
        b_h2 = load(h2, pixel, o_c, o_c < hidden)
    else:
        pre = (one_of(p_pre, n),) + pre_strides
        b_h1 = load(pre, pixel, o_c, o_c < hidden)
        if p_z1 is not None:
            z1, p_own = (one_of(p_z1, n),) + z1_strides, one_of(p_w1, n)
            b_h1, _ = add_convolved(
                b_h1, None, z1, p_own, pixel, o_c, height, width, channels, HS, BLOCK_C, BLOCKS_C, PRECISION, UNROLLED
            )
        b_h1 = tl.where(o_c < hidden, relu(b_h1), 0.0).to(p_w3.dtype.element_ty)
        b_h2 = tl.dot(b_h1, tl.load(one_of(p_w2, n) + o_w2), input_precision=PRECISION)
        b_h2 = relu(add_bias(b_h2, one_of(p_b2, n), o_c, o_c < hidden))
        store(h2, pixel, o_c, b_h2, o_c < hidden)
    b_dh2 = tl.where(b_h2 <= 0.0, 0.0, b_dh2).to(p_w3.dtype.element_ty)
    if p_dh2 is not None:
        store((one_of(p_dh2, n),) + dh2_strides, pixel, o_c, b_dh2, o_c < hidden)
    b_dpre = tl.dot(b_dh2, tl.load(one_of(p_w2_transposed, n) + o_w2), input_precision=PRECISION)
    if p_pre is None:
        b_h1 = relu(load((one_of(p_h1, n),) + h1_strides, pixel, o_c, o_c < hidden)).to(b_dh2.dtype)
    store(dpre, pixel, o_c, tl.where(b_h1 <= 0.0, 0.0, b_dpre), o_c < hidden)
    if p_sums is not None:
        p_own, o_n = one_of(p_sums, n) + i * (hidden * hidden + hidden), tl.trans(o_c)
        b_dw2 = tl.dot(tl.trans(b_dh2), b_h1, input_precision=PRECISION)
        tl.store(p_own + o_n * hidden + o_c, b_dw2, mask=(o_n < hidden) & (o_c < hidden))
        tl.store(p_own + hidden * hidden + o_c, tl.sum(b_dh2.to(tl.float32), axis=0)[None, :], mask=o_c < hidden)


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


def step_network_backward(
    dh: Sequence[Tensor],
    z1: Sequence[Tensor | None],
    pre: Sequence[Tensor],
    hidden: Sequence[tuple[Tensor | None, Tensor]] | None,
    networks: Sequence[tuple],
    dpre: Sequence[Tensor],
    dz1: Sequence[Tensor | None],
    *,
    tf32: bool = False,
    packed: Sequence[Sequence[Tensor]] = (),
) -> list[Layers]:
    """As the reference's, but that of few hidden channels `sums` take the place of h1 and dh2. The last kernels add to dz1."""
    check_dtype(pre[0], "pre")
    kind = arithmetic(pre[0], tf32)
    fused, recomputed = pre[0].numel() > 0 and block(pre[0].shape[1]) <= FUSED, hidden is None
    if hidden is None:
        hidden = [(None if x is None or fused else _empty(p), _empty(p)) for x, p in zip(z1, pre)]
    layers = [Layers(h1, h2, None if fused else _empty(h2)) for h1, h2 in hidden]
    if pre[0].numel() == 0:
        return layers
    packed = packed or [_packed_twice(w1, w2, w3, pre[0].dtype) for w1, w2, _, w3, _ in networks]
    biases = [network[2] for network in networks]
    if recomputed and not fused:
        for x, own_pre, weights, b2, found in zip(z1, pre, packed, biases, layers):
            launch_hidden(x, own_pre, Packed(*weights[:3]), b2, found.h1, found.h2, kind)
        recomputed = False
    sums = _launch_hidden_backward(dh, z1, pre, layers, dpre, packed, biases, kind, recomputed)
    for own_dpre, weights, own_dz1 in zip(dpre, packed, dz1):
        if own_dz1 is not None:
            _launch_state_backward(own_dpre, weights[3], own_dz1, kind)
    return [Layers(None, found.h2, None, own) for found, own in zip(layers, sums, strict=True)] if fused else layers


def _empty(x: Tensor) -> Tensor:
    return empty_channels_last(x.shape, x)


def _packed_twice(w1: Tensor | None, w2: Tensor, w3: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The weights of a network as the forward kernels read them, and transposed."""
    stacks = [None if weight is None else weight[None] for weight in (w1, w2, w3)]
    both = [step_network_weights(*stacks, dtype, transposed) for transposed in (False, True)]
    return tuple(stack[0] for found in both for stack in found)


def _launch_hidden_backward(
    dh: Sequence[Tensor],
    z1: Sequence[Tensor | None],
    pre: Sequence[Tensor],
    layers: Sequence[Layers],
    dpre: Sequence[Tensor],
    packed: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor],
    kind: str,
    recomputed: bool,
) -> list[Tensor]:
    """Write dpre, h2 if it is `recomputed`, and dh2 where there is room for it; else return the sums of every network."""
    batch, hidden, height, width = pre[0].shape
    w1, w2, _, _, w2_transposed, w3_transposed = zip(*packed)
    outs, hs = w3_transposed[0].shape[1:]
    h1, h2, dh2, _ = zip(*layers)
    if not recomputed:
        z1 = [None] * len(dh)
        h1 = [own_pre if own is None else own for own, own_pre in zip(h1, pre)]
    fused, sums = dh2[0] is None, []
    sums_of_pixel = hs if kind != "ieee" else 4 * hs if fused else 2 * hs  # as many pixels as the forward pass spill
    tiles, options = tiling(kind, height, width, sums_of_pixel)
    if fused:  # two sums a pixel and channel: 4 warps spill
        options["num_warps"] = 8
        shape = len(dh), tiles * batch, hidden * hidden + hidden
        sums = list(torch.empty(shape, dtype=torch.float32, device=pre[0].device))
    block_k = OUTPUTS_READ if outs % OUTPUTS_READ == 0 else INPUTS
    launch(
        hidden_backward_kernel,
        len(dh) * tiles * batch,
        pre[0].device,
        **images("dh", dh),
        **images("z1", z1),
        **images("pre", pre if recomputed else [None]),
        **images("h1", h1),
        **images("h2", h2),
        **images("dh2", dh2),
        **images("dpre", [writable(x) for x in dpre], written=True),
        p_sums=tuple(sums) or None,
        p_w1=w1,
        p_w2=w2,
        p_b2=tuple(map(dense, biases)),
        p_w2_transposed=w2_transposed,
        p_w3_transposed=w3_transposed,
        batch=batch,
        height=height,
        width=width,
        channels=0 if z1[0] is None else z1[0].shape[1],
        hidden=hidden,
        outputs=dh[0].shape[1],
        HS=hs,
        BLOCK_C=INPUTS,
        BLOCKS_C=w1[0].shape[1] // INPUTS,
        BLOCK_K=block_k,
        BLOCKS_K=outs // block_k,
        **options,
    )
    return sums


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
