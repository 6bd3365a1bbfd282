"""Residual blocks of dense blocks in plain PyTorch: what a kernel of them computes (`ncsr_fast.kernels.dense_blocks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.layout import dense_format
from ncsr_fast.ops.plain_convolution import convolve, convolve_backward


class DenseBlocks(NamedTuple):
    """The form of residual blocks, one after the other.

    Args:
        dense: Dense blocks of a residual block.
        convolutions: Of a dense block.
        kept: Numbers of the residual blocks whose outputs are returned, in ascending order; the last is one of them.
        slope: Of the leaky ReLUs.
        residual: Factor of the branch of every dense block and of every residual block.
    """

    dense: int
    convolutions: int
    kept: tuple[int, ...]
    slope: float
    residual: float

    def growth(self, weights: Sequence[Tensor]) -> tuple[int, int]:
        """Channels that a convolution adds to the buffer of a dense block, and that all of them add."""
        growth = weights[0].shape[0]
        return growth, growth * (self.convolutions - 1)


def dense_blocks_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    blocks: DenseBlocks,
    *,
    tf32: bool = False,
    saves: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """The outputs of the residual blocks that are kept, in the dtype of x, and what the backward pass reads.

        x_j = leaky_relu(w_j ∗ [x_0 … x_{j-1}] + b_j)  (j = 1 … n-1),  y = x_0 + residual · (w_n ∗ [x_0 … x_{n-1}] + b_n)

    for a dense block, and x + residual · (the last dense block's output) for a residual block.

    Args:
        x: (B, C, H, W).
        weights: Of all convolutions in turn: n - 1 of G outputs and one of C in each dense block.
        biases: Likewise.
        blocks: The form.
        tf32: Whether a GPU may round float32 operands to TF32.
        saves: False where no gradient is wanted: nothing is saved then.

    Returns:
        The outputs, and [x_0 … x_{n-1}] of all dense blocks, (dense blocks · B, C + (n - 1)·G, H, W).
    """
    channels, (_, grown), batch = x.shape[1], blocks.growth(weights), len(x)
    count, layout = len(weights) // blocks.convolutions, dense_format(x)
    saved = x.new_empty(count * batch if saves else batch, channels + grown, *x.shape[2:]).to(memory_format=layout)
    outputs, start = [], x
    for index in range(count):
        features = saved[index * batch :][:batch] if saves else saved
        features[:, :channels] = x
        first, end = index * blocks.convolutions, channels
        for number in range(first, first + blocks.convolutions - 1):
            y = F.leaky_relu(convolve(features[:, :end], weights[number], biases[number], tf32), blocks.slope)
            features[:, end : end + y.shape[1]] = y
            end += y.shape[1]
        last = first + blocks.convolutions - 1
        x = torch.add(x, convolve(features, weights[last], biases[last], tf32), alpha=blocks.residual)
        if index % blocks.dense == blocks.dense - 1:
            start = x = torch.add(start, x, alpha=blocks.residual)
            outputs += [x] if index // blocks.dense in blocks.kept else []
    return outputs, saved if saves else None


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
    """The gradients of x, if it is needed, and of weight and bias of every convolution in turn, if those are.

    Args:
        grads: Of the outputs.
        saved: By the forward pass.
        weights: As there.
        biases: As there.
        blocks: As there.
        needed: Whether the gradient of x is, and whether those of the parameters are.
        tf32: As there.

    Returns:
        The former or None; the latter in the dtype of x or the one in which a backend sums, or an empty list.
    """
    (batch, channels, *_), incoming = grads[-1].shape, dict(zip(blocks.kept, grads))
    found: list[Tensor] = []
    dy = dstart = torch.zeros_like(grads[-1])
    for index in reversed(range(len(weights) // blocks.convolutions)):
        features, block = saved[index * batch :][:batch], index // blocks.dense
        if index % blocks.dense == blocks.dense - 1:
            dstart = dy + incoming[block] if block in incoming else dy
            dy = dstart * blocks.residual
        gradient, parameters = _dense_block_backward(dy, features, weights, index, blocks, needed[1], tf32)
        found = parameters + found
        dy = gradient[:, :channels] + dy
        if index % blocks.dense == 0:
            dy = dy + dstart
    return dy if needed[0] else None, found


def _dense_block_backward(
    dy: Tensor,
    features: Tensor,
    weights: Sequence[Tensor],
    index: int,
    blocks: DenseBlocks,
    parameters: bool,
    tf32: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the features of dense block `index` by its convolutions, and of their weights and biases in turn."""
    last, needed = (index + 1) * blocks.convolutions - 1, (True, parameters, parameters)
    total, *found = convolve_backward(dy * blocks.residual, features, weights[last], needed, tf32)
    assert total is not None
    for number in range(last - 1, last - blocks.convolutions, -1):
        outputs, inputs = weights[number].shape[:2]
        added = slice(inputs, inputs + outputs)
        inner = torch.ops.aten.leaky_relu_backward(total[:, added], features[:, added], blocks.slope, True)
        dread, *gradients = convolve_backward(inner, features[:, :inputs], weights[number], needed, tf32)
        assert dread is not None
        total[:, :inputs] += dread
        found = gradients + found
    return total, [gradient for gradient in found if gradient is not None]
