"""All residual blocks of the RRDB encoder by one kernel function of a backend that has one, forward and backward.

Features go from the buffer of a dense block straight to that of the next, without copies and sums between them. What is saved
is all buffers, as dense blocks one by one save them (`dense_block`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.autocast import autocast
from ncsr_fast.engine.dense_block import dense_block
from ncsr_fast.ops.backend import companion_backend, kernels
from ncsr_fast.ops.conv3x3 import ConvolutionMethod
from ncsr_fast.ops.operator import Operator, Outputs, Tensors
from ncsr_fast.ops.plain_dense_blocks import DenseBlocks

Pairs = Sequence[tuple[Tensor, Tensor]]


def has_residual_blocks(x: Tensor, method: ConvolutionMethod) -> bool:
    """True where the backend has a kernel function for features like x."""
    return companion_backend("dense_blocks", method.backend, autocast(x)) != "reference"


def residual_blocks(x: Tensor, convolutions: Pairs, blocks: DenseBlocks, method: ConvolutionMethod) -> Outputs:
    """The outputs (B, C, H, W) of the residual blocks that are kept. Differentiable.

    Args:
        x: (B, C, H, W).
        convolutions: (weight, bias) of all 3×3 convolutions in turn.
        blocks: The form of the residual blocks.
        method: How to convolve.
    """
    tensors = autocast(x), *itertools.chain.from_iterable(convolutions)
    saves = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _residual_blocks(tensors, blocks, saves, method)


def _forward(tensors: Outputs, blocks: DenseBlocks, saves: bool, method: ConvolutionMethod) -> tuple[Outputs, Tensors]:
    x = tensors[0]
    forward = _kernels(x, method).dense_blocks_forward
    outputs, saved = forward(x, tensors[1::2], tensors[2::2], blocks, tf32=method.tf32, saves=saves)
    return tuple(outputs), (saved,)


def _backward(
    grads: Outputs,
    inputs: Outputs,
    saved: Outputs,
    needed: tuple[bool, ...],
    blocks: DenseBlocks,
    _: bool,
    method: ConvolutionMethod,
) -> Tensors:
    backward = _kernels(inputs[0], method).dense_blocks_backward
    wanted = needed[0], any(needed[1:])
    dx, found = backward(grads, saved[0], inputs[1::2], inputs[2::2], blocks, wanted, tf32=method.tf32)
    parameters = inputs[1:]
    if not found:
        return dx, *[None] * len(parameters)
    return dx, *(gradient.to(parameter.dtype) for gradient, parameter in zip(found, parameters))


def _reference(x: Tensor, *arguments: Any) -> Outputs:
    *parameters, blocks, _, method = arguments
    pairs, outputs, start = list(zip(parameters[::2], parameters[1::2])), [], x
    for index in range(len(pairs) // blocks.convolutions):
        block_pairs = pairs[index * blocks.convolutions : (index + 1) * blocks.convolutions]
        x = dense_block(x, block_pairs, blocks.slope, blocks.residual, method)
        if index % blocks.dense == blocks.dense - 1:
            start = x = start + blocks.residual * x
            outputs += [x] if index // blocks.dense in blocks.kept else []
    return tuple(outputs)


def _kernels(x: Tensor, method: ConvolutionMethod) -> Any:
    return kernels(companion_backend("dense_blocks", method.backend, x))


_residual_blocks = Operator("ResidualBlocks", forward=_forward, backward=_backward, reference=_reference)
