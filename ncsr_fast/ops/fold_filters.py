"""The scales of convolutions' outputs folded into their weights and biases, of several stacks of convolutions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.ops import reference
from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.operator import Operator, Outputs, Tensors


class Filters(NamedTuple):
    """A stack of convolutions whose outputs are scaled by exp(factor · logs), and how their inputs are divided."""

    weight: Tensor  # (K, outputs, inputs, k, k)
    bias: Tensor  # (K, outputs)
    logs: Tensor  # (K, outputs)
    factor: float
    first: int  # inputs whose weights become a tensor of their own


def folded_filters(filters: Sequence[Filters], dtype: torch.dtype, backend: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each stack the scaled weights of the first inputs, those of the other ones, and the biases, dense, in `dtype`.

    Differentiable. `backend` is resolved.
    """
    weights, biases, logs, factors, first = zip(*filters)
    return list(zip(*_parted(_fold_filters((*weights, *biases, *logs), factors, first, dtype, backend))))


def _parted(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Three lists of one length, which follow one another."""
    count = len(tensors) // 3
    return tensors[:count], tensors[count : 2 * count], tensors[2 * count :]


def _forward(
    tensors: Outputs, factors: Sequence[float], first: Sequence[int], dtype: torch.dtype, backend: str
) -> tuple[Outputs, Tensors]:
    found = kernels(backend).fold_filters_forward(*_parted(tensors), factors, first, dtype)
    return tuple(tensor for some in found for tensor in some), ()


def _backward(grads: Outputs, tensors: Outputs, _: Tensors, __: object, factors: Sequence[float], *rest: Any) -> Tensors:
    (dfirst, drest, dfolded), given = _parted(grads), _parted(tensors)
    found = kernels(rest[-1]).fold_filters_backward(dfirst, drest, dfolded, *given, factors)
    return tuple(tensor for some in found for tensor in some)


def _reference(*arguments: Any) -> Outputs:
    *tensors, factors, first, dtype, _ = arguments
    found = reference.fold_filters_forward(*_parted(tensors), factors, first, dtype)
    return tuple(tensor for some in found for tensor in some)


_fold_filters = Operator("FoldFilters", forward=_forward, backward=_backward, reference=_reference)
