"""The weights and biases of convolutions times the scales of their outputs, of all networks of a level in one launch.

    folded[o, i] = weight[o, i] · s[o],   folded_bias[o] = bias[o] · s[o],   s[o] = exp(factor · logs[o])

and from the gradients g of the folded weights and h of the folded biases, for each output,

    dweight[o, i] = g[o, i] · s[o],   dbias[o] = h[o] · s[o]
    dlogs[o] = factor · s[o] · (Σ_i g[o, i] · weight[o, i] + h[o] · bias[o])

A weight is rows of numbers here, one an output; the first numbers of every row and the rest may go to two tensors, those that
the state is multiplied by and those of the condition. A program of the backward kernel has a row, so a sum has one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import check_dtype, dense, launch

SCALED = 1024  # numbers that a program of the forward kernel scales, and one of the backward kernel reads at once: 8 a thread
Folded = tuple[list[Tensor], list[Tensor], list[Tensor]]  # of every weight the first inputs, the other ones, and the bias


@triton.jit
def fold_filters_forward_kernel(filters, BLOCK: tl.constexpr):
    """filters: of each the pointers to its weight, bias and logs, the factor, the pointers to the first numbers of the folded
    rows, to the others, and to the folded bias, then how many rows there are, first numbers in each, and others."""
    i = tl.program_id(0)
    for i_f in tl.static_range(len(filters)):
        p_weight, p_bias, p_logs, FACTOR, p_first, p_rest, p_folded_bias, ROWS, FIRST, REST = filters[i_f]
        blocks = (ROWS * (FIRST + REST) + BLOCK - 1) // BLOCK
        if (i >= 0) & (i < blocks):
            o = i * BLOCK + tl.arange(0, BLOCK)
            m = o < ROWS * (FIRST + REST)
            row, column = o // (FIRST + REST), o % (FIRST + REST)
            b_scale = tl.exp(tl.load(p_logs + row, mask=m, other=0.0).to(tl.float32) * FACTOR)
            b = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32) * b_scale
            tl.store(p_first + row * FIRST + column, b.to(p_first.dtype.element_ty), mask=m & (column < FIRST))
            tl.store(p_rest + row * REST + (column - FIRST), b.to(p_rest.dtype.element_ty), mask=m & (column >= FIRST))
            b = tl.load(p_bias + row, mask=m & (column == 0), other=0.0).to(tl.float32) * b_scale
            tl.store(p_folded_bias + row, b.to(p_folded_bias.dtype.element_ty), mask=m & (column == 0))
        i -= blocks


@triton.jit
def fold_filters_backward_kernel(filters, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """filters: of each the pointers to its weight, bias and logs, the factor, the pointers to the gradients of the first
    numbers of the folded rows, of the others and of the folded bias, the pointers to the gradients of weight, bias and logs,
    then how many rows there are, first numbers in each, and others. BLOCKS: of the longest rows."""
    i = tl.program_id(0)
    for i_f in tl.static_range(len(filters)):
        p_weight, p_bias, p_logs, FACTOR, p_dfirst, p_drest, p_dfolded = filters[i_f][:7]
        p_dweight, p_dbias, p_dlogs, ROWS, FIRST, REST = filters[i_f][7:]
        if (i >= 0) & (i < ROWS):
            scale = tl.exp(tl.load(p_logs + i).to(tl.float32) * FACTOR)
            b_products = tl.zeros([BLOCK], tl.float32)
            for i_block in tl.static_range(BLOCKS):
                o = i_block * BLOCK + tl.arange(0, BLOCK)
                m = o < FIRST + REST
                b_first = tl.load(p_dfirst + i * FIRST + o, mask=o < FIRST, other=0.0).to(tl.float32)
                b_rest = tl.load(p_drest + i * REST + (o - FIRST), mask=m & (o >= FIRST), other=0.0).to(tl.float32)
                b_weight = tl.load(p_weight + i * (FIRST + REST) + o, mask=m, other=0.0).to(tl.float32)
                b_products += (b_first + b_rest) * b_weight
                b = (b_first + b_rest) * scale
                tl.store(p_dweight + i * (FIRST + REST) + o, b.to(p_dweight.dtype.element_ty), mask=m)
            dfolded = tl.load(p_dfolded + i).to(tl.float32)
            dscale = tl.sum(b_products) + dfolded * tl.load(p_bias + i).to(tl.float32)
            tl.store(p_dbias + i, (dfolded * scale).to(p_dbias.dtype.element_ty))
            tl.store(p_dlogs + i, (scale * dscale * FACTOR).to(p_dlogs.dtype.element_ty))
        i -= ROWS


def fold_filters_forward(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    logs: Sequence[Tensor],
    factors: Sequence[float],
    first: Sequence[int],
    dtype: torch.dtype,
) -> Folded:
    """As the reference's."""
    check_dtype(weights[0], "weights")
    folded: Folded = ([], [], [])
    for weight, bias, count in zip(weights, biases, first):
        (*outer, inputs, height, width) = weight.shape
        for into, shape in zip(folded, ((*outer, count, height, width), (*outer, inputs - count, height, width), bias.shape)):
            into.append(torch.empty(shape, dtype=dtype, device=weight.device))
    given = zip(map(dense, weights), map(dense, biases), map(dense, logs), map(tl.constexpr, factors))
    sizes = [_sizes(*parts) for parts in zip(*folded)]
    launch(
        fold_filters_forward_kernel,
        sum(triton.cdiv(weight.numel(), SCALED) for weight in weights),
        weights[0].device,
        filters=tuple((*own, *parts, *size) for own, parts, size in zip(given, zip(*folded), sizes)),
        BLOCK=SCALED,
    )
    return folded


def fold_filters_backward(
    dfirst: Sequence[Tensor],
    drest: Sequence[Tensor],
    dfolded: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    logs: Sequence[Tensor],
    factors: Sequence[float],
) -> Folded:
    """As the reference's."""
    gradients = tuple(
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in some] for some in (weights, biases, logs)
    )
    parts = list(zip(map(dense, dfirst), map(dense, drest), map(dense, dfolded)))
    given = zip(map(dense, weights), map(dense, biases), map(dense, logs), map(tl.constexpr, factors))
    filters = [(*own, *part, *into, *_sizes(*part)) for own, part, into in zip(given, parts, zip(*gradients))]
    launch(
        fold_filters_backward_kernel,
        sum(bias.numel() for bias in biases),
        weights[0].device,
        filters=tuple(filters),
        BLOCK=SCALED,
        BLOCKS=max(triton.cdiv(weight[0, 0].numel(), SCALED) for weight in weights),
    )
    return gradients


def _sizes(first: Tensor, rest: Tensor, bias: Tensor) -> tuple[tl.constexpr, ...]:
    """Rows, first numbers in each, and others."""
    rows = bias.numel()
    return tuple(map(tl.constexpr, (rows, first.numel() // rows, rest.numel() // rows)))
