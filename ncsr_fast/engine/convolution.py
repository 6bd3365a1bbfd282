"""Convolutions of a stated precision, forward and backward, and of networks wider or narrower than their parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.engine.function import Piece, Tensors
from ncsr_fast.precision import convolution_precision


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str | None) -> Tensor:
    """The k×k convolution of x (B, C, H, W), k odd, with zero padding that keeps the size, in the dtype of x.

    `precision` as in `EngineOptions`, for this convolution and for its gradients, whatever the global flags are then;
    None leaves it to them.
    """
    return plain_convolution(x, weight, bias) if precision is None else _convolution((x, weight, bias), precision)[0]


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same at the precision the flags now say."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2)


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those `needed`, in the dtype of x."""
    padding = [weight.shape[-1] // 2] * 2
    return torch.ops.aten.convolution_backward(
        dy, x, weight.to(x.dtype), [weight.shape[0]], [1, 1], padding, [1, 1], False, [0, 0], 1, needed
    )


def _forward(tensors: Tensors, precision: str) -> tuple[Tensors, Tensors]:
    with convolution_precision(precision):
        return (plain_convolution(*tensors),), ()


def _backward(grads: Tensors, inputs: Tensors, _: Tensors, needed: tuple[bool, ...], precision: str) -> Tensors:
    x, weight, bias = inputs
    with convolution_precision(precision):
        dx, dweight, dbias = convolution_backward(grads[0], x, weight, needed)
    return dx, _like(dweight, weight), _like(dbias, bias)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of its parameter."""
    return None if gradient is None else gradient.to(parameter.dtype)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, _: str) -> Tensors:
    return (plain_convolution(x, weight, bias),)


_convolution = Piece("Convolution", forward=_forward, backward=_backward, reference=_reference)
