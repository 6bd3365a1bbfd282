"""Residual blocks of dense blocks, of 3×3 convolutions that write every channel once, forward and backward.

A dense block has n convolutions of a buffer of M = C + (n - 1)·G channels. Of x_0 (C channels) and what they add (G each),

    x_j = σ(w_j ∗ [x_0 … x_{j-1}] + b_j)  (j = 1 … n-1),    y = x_0 + ρ · (w_n ∗ [x_0 … x_{n-1}] + b_n)

with σ a leaky ReLU; a residual block is D dense blocks one after the other, and y = x + ρ · (the last of them). The last
convolution of a dense block adds x_0, the one of a residual block x too, and writes to the buffer of the next.

Backward, with d_n = dy and d_j the gradient of what σ of x_j is given, x_j is read by all convolutions behind it, so that

    d_j = σ' · Σ_{i>j} w_i[:, x_j]ᵀ ∗ d_i  (j = n-1 … 1),    dx_0 = Σ_i w_i[:, x_0]ᵀ ∗ d_i + dy

which is one convolution of the channels [d_{j+1} … d_n] of a second buffer: it too has every channel written once, the
last C of them by the dense block behind, and no sum is rounded on its way through memory.

For both, the weights of a dense block lie in one matrix (M, 9, M), w_j in the rows from (j - 1)·G on; forward reads some rows
of it, backward some columns from a row on. ρ, or ρ² at the end of a residual block, is multiplied to w_n and b_n there. One
launch lays out the weights of many dense blocks. The gradients of all weights of a residual block are one product of its
buffers, and a sum of parts in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import check_dtype, dense, launch
from ncsr_fast.kernels._conv3x3_weight import SUM_OUTPUTS, SUM_PARTS, weight_partials
from ncsr_fast.kernels.conv3x3 import convolve
from ncsr_fast.layout import empty_channels_last, empty_like, in_memory
from ncsr_fast.ops.plain_dense_blocks import DenseBlocks

PACKED = 1024  # numbers that a program of `pack_dense_blocks_kernel` copies, 8 a thread
TAKEN = 128  # weights that a launch takes, at most: with their biases 2 of the 4 kB that the arguments of a kernel may have


@triton.jit(do_not_specialize=["first"])
def pack_dense_blocks_kernel(
    weights,  # pointers of the weights (outputs, inputs, 3, 3), inputs adjacent with INPUTS_ADJACENT, and dense
    biases,  # of the biases
    p_weight,  # (dense blocks, width, 9, width)
    p_bias,  # (dense blocks, width), float32
    first,  # number of the first of the weights
    residual,
    channels: tl.constexpr,
    GROWTH: tl.constexpr,
    GROWN: tl.constexpr,
    DENSE: tl.constexpr,
    INPUTS_ADJACENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one block of one weight to its place; with the first block its bias."""
    WIDTH: tl.constexpr = channels + GROWN * GROWTH
    MOST: tl.constexpr = 9 * max(channels, GROWTH) * WIDTH
    i_weight, i_block = tl.program_id(0) // tl.cdiv(MOST, BLOCK), tl.program_id(0) % tl.cdiv(MOST, BLOCK)
    p_from, p_from_bias = weights[0], biases[0]
    for i_other in tl.static_range(1, len(weights)):
        p_from = tl.where(i_weight == i_other, weights[i_other], p_from)
        p_from_bias = tl.where(i_weight == i_other, biases[i_other], p_from_bias)
    i_dense, i = (first + i_weight) // (GROWN + 1), (first + i_weight) % (GROWN + 1)
    inputs, outputs = channels + i * GROWTH, tl.where(i < GROWN, GROWTH, channels)
    scale = tl.where(i < GROWN, 1.0, tl.where(i_dense % DENSE < DENSE - 1, residual, residual * residual))
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    o_n, o_tap, o_c = o // (9 * inputs), o // inputs % 9, o % inputs
    o_from = o if INPUTS_ADJACENT else (o_n * inputs + o_c) * 9 + o_tap
    b = tl.load(p_from + o_from, mask=o_n < outputs).to(tl.float32) * scale
    o_to = ((i_dense.to(tl.int64) * WIDTH + i * GROWTH + o_n) * 9 + o_tap) * WIDTH + o_c
    tl.store(p_weight + o_to, b.to(p_weight.dtype.element_ty), mask=o_n < outputs)
    m_bias = o < tl.where(i_block == 0, outputs, 0)
    b_bias = tl.load(p_from_bias + o, mask=m_bias).to(tl.float32) * scale
    tl.store(p_bias + i_dense.to(tl.int64) * WIDTH + i * GROWTH + o, b_bias, mask=m_bias)


@triton.jit(do_not_specialize=["parts"])
def sum_dense_block_partials_kernel(
    p_partial,  # (DENSE, parts, 9 · width · width + width)
    p_gradient,  # (DENSE, numbers + width): of a dense block its weights (outputs, inputs, 9) in turn, and its biases
    parts,
    residual,
    channels: tl.constexpr,
    numbers: tl.constexpr,
    GROWTH: tl.constexpr,
    GROWN: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The gradients of the parameters of a residual block: sums over the parts, in float64."""
    WIDTH: tl.constexpr = channels + GROWN * GROWTH
    WEIGHTS: tl.constexpr = 9 * WIDTH * WIDTH
    i_dense = (tl.program_id(0) // tl.cdiv(WEIGHTS + WIDTH, BLOCK)).to(tl.int64)
    o = (tl.program_id(0) % tl.cdiv(WEIGHTS + WIDTH, BLOCK) * BLOCK + tl.arange(0, BLOCK))[None, :]
    o_tap, o_c = o // (WIDTH * WIDTH), o % WIDTH
    o_row = tl.where(o < WEIGHTS, o // WIDTH % WIDTH, o - WEIGHTS)
    o_i = tl.minimum(o_row // GROWTH, GROWN)
    inputs = channels + o_i * GROWTH
    m = (o < WEIGHTS + WIDTH) & ((o_c < inputs) | (o >= WEIGHTS))
    b_sum = tl.zeros([BLOCK_PARTS, BLOCK], tl.float64)
    for i_part in range(0, parts, BLOCK_PARTS):
        o_part = (i_part + tl.arange(0, BLOCK_PARTS))[:, None]
        p = p_partial + (i_dense * parts + o_part) * (WEIGHTS + WIDTH) + o
        b_sum += tl.load(p, mask=m & (o_part < parts), other=0.0).to(tl.float64)
    scale = tl.where(o_i < GROWN, 1.0, tl.where(i_dense < DENSE - 1, residual, residual * residual))
    b = tl.sum(b_sum, axis=0)[None, :].to(tl.float32) * scale
    before = GROWTH * (o_i * channels + GROWTH * (o_i * (o_i - 1) // 2))  # inputs and outputs of the convolutions before
    o_weight = (before + (o_row - o_i * GROWTH) * inputs + o_c) * 9 + o_tap
    o_to = i_dense * (numbers + WIDTH) + tl.where(o < WEIGHTS, o_weight, numbers + o_row)
    tl.store(p_gradient + o_to, b, mask=m)


def dense_blocks_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    blocks: DenseBlocks,
    *,
    tf32: bool = False,
    saves: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """As the reference's; the outputs but for the last are channels of the buffers."""
    check_dtype(x)
    channels, (growth, grown) = x.shape[1], blocks.growth(weights)
    batch, total = len(x), len(weights) // blocks.convolutions
    weight, bias = _packed(weights, biases, blocks, channels, x.dtype)
    shape = batch, channels + grown, *x.shape[2:]
    saved = empty_channels_last((total * batch, *shape[1:]), x) if saves else None

    def buffer(index: int) -> Tensor:
        return empty_channels_last(shape, x) if saved is None else saved[index * batch :][:batch]

    features, outputs = buffer(0), []
    features[:, :channels] = x
    for index in range(total):
        for row in range(0, grown, growth):
            read, rows = channels + row, slice(row, row + growth)
            y = features[:, read : read + growth]
            convolve(features[:, :read], weight[index, rows, :read], bias[index, rows], y, blocks.slope, tf32=tf32)
        own, ends = features[:, :channels], index % blocks.dense == blocks.dense - 1
        if index % blocks.dense == 0:
            start = own
        following = None if index == total - 1 else buffer(index + 1)
        y = empty_channels_last(x.shape, x) if following is None else following[:, :channels]
        added = [(start, 1.0), (own, blocks.residual)] if ends else [(own, 1.0)]
        convolve(features, weight[index, grown:], bias[index, grown:], y, added=added, tf32=tf32)
        if ends and index // blocks.dense in blocks.kept:
            outputs.append(y)
        features = y if following is None else following
    return outputs, saved


def dense_blocks_backward(
    grads: Sequence[Tensor],
    saved: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    blocks: DenseBlocks,
    needed: tuple[bool, bool],
    *,
    tf32: bool = False,
) -> tuple[Tensor | None, list[Tensor]]:
    """As the reference's, but that the gradients of the parameters are float32."""
    last = grads[-1]
    check_dtype(last)
    (batch, channels, *_), (growth, grown) = last.shape, blocks.growth(weights)
    weight, _ = _packed(weights, biases, blocks, channels, last.dtype)
    incoming, found, block_rows = dict(zip(blocks.kept, grads)), [], blocks.dense * batch
    count = len(weights) // (blocks.dense * blocks.convolutions)
    features = [saved[block * block_rows :][:block_rows] for block in range(count)]
    gradients, dx = empty_channels_last(features[-1].shape, last), empty_like(last)
    gradients[-batch:, grown:] = last
    for block in reversed(range(count)):
        previous = empty_like(gradients) if block else None
        given = gradients[-batch:, grown:]
        for index in reversed(range(blocks.dense)):
            rows, i = slice(index * batch, (index + 1) * batch), block * blocks.dense + index
            gradient = gradients[rows]
            _backward_to_inputs(gradient, features[block][rows], weight[i], growth, grown, blocks.slope, tf32)
            added = [(gradient[:, grown:], blocks.residual if index == blocks.dense - 1 else 1.0)]
            if index:
                into = gradients[(index - 1) * batch : index * batch, grown:]
            elif previous is not None:
                into = previous[-batch:, grown:]
            else:
                into = dx
            if index == 0:
                added += [(given, 1.0)] + ([(incoming[block - 1], 1.0)] if block - 1 in incoming else [])
            if i or needed[0]:
                convolve(gradient, weight[i, :, :channels], None, into, added=added, transposed=True, tf32=tf32)
        if needed[1]:
            found = _backward_to_parameters(gradients, features[block], weights, blocks, tf32) + found
        gradients = gradients if previous is None else previous
    return dx if needed[0] else None, found


def _backward_to_inputs(
    gradient: Tensor, features: Tensor, weight: Tensor, growth: int, grown: int, slope: float, tf32: bool
) -> None:
    """Write d_1 … d_{n-1} of a dense block, the last first, to the channels of `gradient` before those of d_n."""
    channels = features.shape[1] - grown
    for end in range(grown, 0, -growth):
        slot = slice(channels + end - growth, channels + end)
        convolve(
            gradient[:, end:],
            weight[end:, slot],
            None,
            gradient[:, end - growth : end],
            slope,
            features[:, slot],
            transposed=True,
            tf32=tf32,
        )


def _backward_to_parameters(
    gradients: Tensor, features: Tensor, weights: Sequence[Tensor], blocks: DenseBlocks, tf32: bool
) -> list[Tensor]:
    """The gradients of the weights and biases of a residual block, in turn, from d_j and x_j of its dense blocks."""
    (growth, grown), width = blocks.growth(weights), features.shape[1]
    dense_weights = weights[: blocks.convolutions]
    numbers = sum(weight.numel() for weight in dense_weights)
    gradient = torch.empty(blocks.dense, numbers + width, dtype=torch.float32, device=features.device)
    if features.numel() == 0:
        gradient.zero_()
    else:
        partial = weight_partials(gradients, features, batches=blocks.dense, growth=(growth, grown // growth), tf32=tf32)
        launch(
            sum_dense_block_partials_kernel,
            blocks.dense * triton.cdiv(partial.shape[2], SUM_OUTPUTS),
            features.device,
            p_partial=partial,
            p_gradient=gradient,
            parts=partial.shape[1],
            residual=float(blocks.residual),
            channels=width - grown,
            numbers=numbers,
            GROWTH=growth,
            GROWN=grown // growth,
            DENSE=blocks.dense,
            BLOCK=SUM_OUTPUTS,
            BLOCK_PARTS=SUM_PARTS,
        )
    found = []
    for row in gradient:
        *parts, ends = row.split([*(weight.numel() for weight in dense_weights), width])
        bias_parts = ends.split([weight.shape[0] for weight in dense_weights])
        for weight, part, bias in zip(dense_weights, parts, bias_parts):
            found += [part.view(weight.shape), bias]
    return found


def _packed(
    weights: Sequence[Tensor], biases: Sequence[Tensor], blocks: DenseBlocks, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weights (dense blocks, M, M, 3, 3), inputs adjacent, and biases (dense blocks, M) in float32; what no convolution
    reads is left out."""
    growth, grown = blocks.growth(weights)
    width, total = channels + grown, len(weights) // blocks.convolutions
    adjacent = all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    layout = torch.channels_last if adjacent else torch.contiguous_format
    weights = [in_memory(weight).contiguous(memory_format=layout) for weight in weights]
    biases = [dense(bias) for bias in biases]
    weight = torch.empty(total, width, 3, 3, width, dtype=dtype, device=weights[0].device)
    bias = torch.empty(total, width, dtype=torch.float32, device=weights[0].device)
    taken = triton.cdiv(len(weights), triton.cdiv(len(weights), TAKEN))
    for first in range(0, len(weights), taken):
        given = tuple(weights[first : first + taken])
        launch(
            pack_dense_blocks_kernel,
            len(given) * triton.cdiv(9 * max(channels, growth) * width, PACKED),
            weight.device,
            weights=given,
            biases=tuple(biases[first : first + taken]),
            p_weight=weight,
            p_bias=bias,
            first=first,
            residual=float(blocks.residual),
            channels=channels,
            GROWTH=growth,
            GROWN=grown // growth,
            DENSE=blocks.dense,
            INPUTS_ADJACENT=adjacent,
            BLOCK=PACKED,
        )
    return weight.permute(0, 1, 4, 2, 3), bias
