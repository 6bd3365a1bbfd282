"""The hoisted convolution: the part of all networks' first layers that depends on u, computed as one convolution.

u has two parts: own features at the level's resolution, and stacked features at LR resolution, resized to the level by nearest
neighbour. If the level is f times larger than LR, a stacked pixel b becomes a cell of f×f equal pixels, and a 3×3 window that
crosses an edge of the cell reads the neighbour a (before) or c (after). Along one axis, with weights w0, w1, w2, the outputs
of the cell are

    S + A (first),   S (inner),   S + C (last),      S = (w0 + w1 + w2) b,   A = w0 (a - b),   C = w2 (c - b)

and along both axes a cell needs the nine products {S, A, C} × {S, A, C}: nine 1×1 convolutions at LR resolution in place
of 9 f² multiplications per input and output channel (f = 2: a quarter, f = 4: a sixteenth). Beyond the border a and c are 0,
as in the zero padding of the upsampled image. For f = 2 on a CPU a kernel needs 25 products for four cells instead of 36
(csrc/cpu/conv3x3_transforms.h). On a GPU there may be one that computes both parts at once, for every f (kernels/hoisting.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine.ablation import ablation
from ncsr_fast.engine.condition import Features, resized
from ncsr_fast.layout import traced
from ncsr_fast.ops.backend import companion_backend, kernels
from ncsr_fast.ops.conv3x3 import (
    ConvolutionMethod,
    backend_for,
    conv3x3,
    convolution,
    convolution_backend,
    convolution_backward,
    convolution_forward,
)
from ncsr_fast.ops.operator import Operator, Tensors
from ncsr_fast.ops.plain_convolution import Needed
from ncsr_fast.ops.protocol import Kernels

Products = list[list[Tensor]]  # 1×1 weights (N, s, 1, 1) of {S, A, C} × {S, A, C}


class HoistedWeight(NamedTuple):
    """The weight of a hoisted convolution, prepared for features of one kind and size.

    Args:
        weight: (N, c + s, 3, 3), for c own and s stacked channels; with `products` only the own part, (N, c, 3, 3).
        products: `products_of` the stacked part of the weight; None: computed when needed.
        algorithm: How the features are convolved. "joined": as one tensor, with the stacked features resized; "kernel": by a
            kernel that reads the stacked ones with upsampling ×2; "products": the stacked ones by nine 1×1 convolutions;
            "whole": all at once by a kernel of both parts.
    """

    weight: Tensor
    products: Products | None
    algorithm: str

    def rows(self, first: int, last: int) -> HoistedWeight:
        """The weight of some of the outputs."""
        products = self.products and [[part[first:last] for part in row] for row in self.products]
        return HoistedWeight(self.weight[first:last], products, self.algorithm)


def algorithm(features: Features, rows: int, dtype: torch.dtype, method: ConvolutionMethod) -> str:
    """The `HoistedWeight.algorithm` for features and a weight with `rows` outputs, in this dtype."""
    own, stacked = features
    if stacked is None or not ablation().subpixel:
        return "joined"
    if not traced() and companion_backend("hoisted", method.backend, own) != "reference":
        return "whole"
    if not features.upsampled:
        return "joined"
    shape = rows, stacked.shape[1], 3, 3
    if own.shape[2] == 2 * stacked.shape[2] and backend_for(stacked, shape, dtype, method) != "reference":
        return "kernel"
    return "joined" if traced() else "products"


def prepared(weight: Tensor, own_channels: int, algorithm: str, with_products: bool) -> HoistedWeight:
    """`weight` (N, c + s, 3, 3) for an algorithm; `with_products` computes the products now, for many calls."""
    if algorithm == "products" and with_products:
        return HoistedWeight(weight[:, :own_channels].contiguous(), products_of(weight[:, own_channels:]), algorithm)
    return HoistedWeight(weight, None, algorithm)


def hoisted_convolution(features: Features, weight: HoistedWeight, bias: Tensor, method: ConvolutionMethod) -> Tensor:
    """`weight ∗ u + bias` (B, N, h, w) in the layout and dtype of the level's own features, differentiable.

    Args:
        features: The condition u.
        weight: `prepared` for the features.
        bias: (N,).
        method: How to convolve.
    """
    if weight.algorithm == "joined":
        return convolution(features.joined, weight.weight, bias, method)
    own, stacked = features
    assert stacked is not None
    if weight.algorithm == "whole" and not features.upsampled:
        stacked = resized(stacked, own)
    if weight.products is not None:  # prepared without gradients
        return _upsampled_forward(own, stacked, weight, bias, method)
    return _upsampled((own, stacked, weight.weight, bias), weight.algorithm, method)[0]


def hoisted_networks(
    features: Features, weight: HoistedWeight, bias: Tensor, networks: int, method: ConvolutionMethod
) -> Sequence[Tensor]:
    """`hoisted_convolution` without gradients, the outputs of networks one by one: dense where a kernel writes them so."""
    if weight.algorithm != "whole":
        return hoisted_convolution(features, weight, bias, method).chunk(networks, dim=1)
    own, stacked = features
    assert stacked is not None
    stacked = stacked if features.upsampled else resized(stacked, own)
    return _whole(own, method).hoisted_forward(own, stacked, weight.weight, bias, groups=networks, tf32=method.tf32)


def _whole(own: Tensor, method: ConvolutionMethod) -> Kernels:
    return kernels(companion_backend("hoisted", method.backend, own))


def _reference(
    own: Tensor, stacked: Tensor, weight: Tensor, bias: Tensor, algorithm: str, method: ConvolutionMethod
) -> tuple[Tensor]:
    if algorithm != "kernel":
        return (convolution(Features(own, stacked).joined, weight, bias, method),)
    own_weight, stacked_weight = weight.tensor_split([own.shape[1]], dim=1)
    y = convolution(own, own_weight, bias, method)
    backend = convolution_backend(stacked, stacked_weight, method)
    return (y + conv3x3(stacked, stacked_weight, upsample2x=True, tf32=method.tf32, backend=backend),)


def _forward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], algorithm: str, method: ConvolutionMethod
) -> tuple[tuple[Tensor], Tensors]:
    own, stacked, weight, bias = tensors
    if algorithm == "whole":
        return (_whole(own, method).hoisted_forward(own, stacked, weight, bias, tf32=method.tf32)[0],), ()
    return (_upsampled_forward(own, stacked, HoistedWeight(weight, None, algorithm), bias, method),), ()


def _upsampled_forward(
    own: Tensor, stacked: Tensor, prepared: HoistedWeight, bias: Tensor, method: ConvolutionMethod
) -> Tensor:
    """The convolution of upsampled features, without gradients."""
    split, (weight, rows, algorithm) = own.shape[1], prepared
    y = convolution_forward(own, weight[:, :split], bias, method)
    if algorithm == "kernel":
        backend = convolution_backend(stacked, weight[:, split:], method)
        forward = kernels(backend).conv3x3_forward
        return forward(stacked, weight[:, split:], None, upsample2x=True, tf32=method.tf32, out=y, accumulate=True)
    rows = rows or products_of(weight[:, split:])
    cells = _Cells(own, stacked)
    # along a row first: the terms of the first, the inner and the last columns of a cell
    for i in range(3):
        products = [convolution_forward(cells.difference(i, j), rows[i][j], None, method) for j in range(3)]
        for q in range(cells.factor):
            line = products[0] + products[_side(q, cells.factor)] if _side(q, cells.factor) else products[0]
            for p in cells.rows(i):
                cells.pixels(y, p, q).add_(line)
        del products, line  # before the next three are computed
    return y


def _backward(
    grads: tuple[Tensor],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    __: Tensors,
    needed: tuple[bool, ...],
    algorithm: str,
    method: ConvolutionMethod,
) -> Tensors:
    (dy,), (own, stacked, weight, bias) = grads, tensors
    if algorithm == "whole":
        wanted = needed[0], needed[1], needed[2] or needed[3]
        down, dstacked, dweight, dbias = _whole(own, method).hoisted_backward(dy, *tensors[:3], wanted, tf32=method.tf32)
        return down, dstacked, *(None if d is None else d.to(p.dtype) for d, p in ((dweight, weight), (dbias, bias)))
    split = own.shape[1]
    stacked_weight = weight[:, split:]
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[2] else None
    dfirst, dlast = (None, None) if dweight is None else (dweight[:, :split], dweight[:, split:])
    first_needed = needed[0], needed[2], needed[3]
    down, _, dbias = convolution_backward(dy, own, weight[:, :split], first_needed, method, dweight=dfirst)
    last_needed = needed[1], needed[2], False
    if algorithm == "kernel":
        backward = kernels(convolution_backend(stacked, stacked_weight, method)).conv3x3_backward
        dstacked, _, _ = backward(dy, stacked, stacked_weight, last_needed, upsample2x=True, tf32=method.tf32, dweight=dlast)
    else:
        dstacked, dproducts = _products_backward(dy, own, stacked, products_of(stacked_weight), last_needed, method)
        if dlast is not None:
            dlast.copy_(_products_of_backward(dproducts))
    return down, dstacked, dweight, None if dbias is None else dbias.to(bias.dtype)


def _products_backward(
    dy: Tensor, own: Tensor, stacked: Tensor, rows: Products, needed: Needed, method: ConvolutionMethod
) -> tuple[Tensor | None, Products]:
    """Gradients of the stacked features and of the products' weights."""
    dstacked = torch.zeros_like(stacked) if needed[0] else None
    dproducts: Products = [[] for _ in range(3)]
    cells = _Cells(own, stacked)
    for i in range(3):
        lines = [_sum([cells.pixels(dy, p, q) for p in cells.rows(i)]) for q in range(cells.factor)]
        for j in range(3):
            dproduct = lines[0] if j == 1 else lines[-1] if j == 2 else _sum(lines)
            dx, dweight, _ = convolution_backward(dproduct, cells.difference(i, j), rows[i][j], needed, method)
            if dweight is not None:
                dproducts[i].append(dweight)
            if dx is not None and dstacked is not None:
                dstacked += _difference_backward(_difference_backward(dx, j, 3), i, 2)
    return dstacked, dproducts


class _Cells:
    """The f×f cells of a level's tensors that belong to one stacked pixel each, and the differences of those pixels."""

    def __init__(self, own: Tensor, stacked: Tensor) -> None:
        self.factor, self._stacked = own.shape[2] // stacked.shape[2], stacked

    def pixels(self, x: Tensor, p: int, q: int) -> Tensor:
        """The pixels of x at row p and column q of every cell: (B, N, h', w'), a view."""
        return x[:, :, p :: self.factor, q :: self.factor]

    def rows(self, i: int) -> list[int]:
        """The rows of a cell that product i of the rows is added to: S all, A the first, C the last."""
        return [list(range(self.factor)), [0], [self.factor - 1]][i]

    def difference(self, i: int, j: int) -> Tensor:
        """The factor of product (i, j): b, a - b or c - b along the rows, and the same of that along the columns."""
        return _difference(_difference(self._stacked, i, 2), j, 3)


def _sum(parts: list[Tensor]) -> Tensor:
    """The dense sum of the parts; `sum` would add the first part to 0."""
    total = parts[0].clone() if len(parts) == 1 else parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _side(q: int, factor: int) -> int:
    """The product added to S in column q of a cell: A in the first, C in the last, none in between."""
    return 1 if q == 0 else 2 if q == factor - 1 else 0


def _difference(x: Tensor, kind: int, axis: int) -> Tensor:
    """b for kind 0; a - b, the pixel before less this one, for 1; c - b, the one after less this one, for 2."""
    if kind == 0:
        return x
    y, last = -x, x.shape[axis] - 1
    if kind == 1:
        y.narrow(axis, 1, last).add_(x.narrow(axis, 0, last))
    else:
        y.narrow(axis, 0, last).add_(x.narrow(axis, 1, last))
    return y


def _difference_backward(dy: Tensor, kind: int, axis: int) -> Tensor:
    """The transpose of `_difference`: it reads the pixel after where `_difference` reads the pixel before."""
    return _difference(dy, (0, 2, 1)[kind], axis)


def products_of(weight: Tensor) -> Products:
    """The 1×1 weights (N, s, 1, 1) of the nine products, dense: sums over the window, or its first or last row or column."""
    return [[part.contiguous()[:, :, None, None] for part in _sum_and_ends(row)] for row in _sum_and_ends(weight)]


def _sum_and_ends(weight: Tensor) -> list[Tensor]:
    """Along dimension 2, of three elements: their sum (by additions, ten times faster than `sum`), the first, the last."""
    first, middle, last = weight.unbind(2)
    return [first + middle + last, first, last]


def _products_of_backward(grads: Products) -> Tensor:
    """Gradient (N, s, 3, 3) of the weight: each of its elements is in the sums, and the outer ones in a product more."""
    rows = [_spread([part[:, :, 0, 0] for part in row]) for row in grads]
    return _spread(rows)


def _spread(grads: list[Tensor]) -> Tensor:
    """Gradients of (w0 + w1 + w2, w0, w2) → the gradient of (w0, w1, w2), along a new dimension 2."""
    total, first, last = grads
    return torch.stack([total + first, total, total + last], dim=2)


_upsampled = Operator("UpsampledConvolution", forward=_forward, backward=_backward, reference=_reference)
