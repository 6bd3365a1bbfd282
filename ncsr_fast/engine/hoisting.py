"""The first convolution of every network of a level, as far as it does not depend on the state: one convolution of u.

u has two parts: the encoder's features at the level's own resolution, and stacked block outputs at LR resolution, resized to
it by nearest neighbour. Where the level is f times larger than LR, a stacked pixel b is an f×f cell of copies, and a 3×3
window that looks across one edge of the cell sees the neighbours a (before) and c (after). Along one axis, with weights
w0, w1, w2, the outputs of the cell are

    S + A (first),   S (inner),   S + C (last),      S = (w0 + w1 + w2) b,   A = w0 (a - b),   C = w2 (c - b)

and along both axes a cell needs the nine products {S, A, C} × {S, A, C}: nine 1×1 convolutions at LR resolution in place
of 9 f² multiplications an input and output channel (f = 2: a quarter, f = 4: a sixteenth). Beyond the border a and c are 0,
the zero padding of the enlarged image. For f = 2 on a CPU there is a kernel that takes 25 products for four cells, not 36
(csrc/winograd_transforms_cpu.h).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.engine.convolution import (
    ConvolutionMethod,
    by_winograd,
    convolution,
    convolution_backward,
    convolve,
)
from ncsr_fast.engine.function import Piece, Tensors
from ncsr_fast.ops._backends import implementation


def hoisted_convolution(
    own: Tensor, stacked: Tensor | None, weight: Tensor, bias: Tensor, method: ConvolutionMethod, subpixel: bool = True
) -> Tensor:
    """`weight ∗ [own, resized stacked] + bias`.

    own      (B, c, h, w) features at the level's resolution
    stacked  (B, s, h', w') features at LR resolution, or None; h is f·h' or h'/f for an integer f
    weight   (N, c + s, 3, 3), bias (N,)
    returns  (B, N, h, w) in the layout and dtype of own
    """
    if stacked is None:
        return convolution(own, weight, bias, method)
    if subpixel and own.shape[2] > stacked.shape[2]:
        return _enlarged((own, stacked, weight, bias), method)[0]
    return convolution(_joined(own, stacked), weight, bias, method)


def _joined(own: Tensor, stacked: Tensor) -> Tensor:
    return torch.cat([own, F.interpolate(stacked, size=own.shape[2:], mode="nearest")], dim=1)


def _reference(own: Tensor, stacked: Tensor, weight: Tensor, bias: Tensor, method: ConvolutionMethod) -> Tensors:
    return (convolution(_joined(own, stacked), weight, bias, method),)


def _forward(tensors: Tensors, method: ConvolutionMethod) -> tuple[Tensors, Tensors]:
    return (enlarged_convolution(*tensors, method),), ()


def enlarged_convolution(
    own: Tensor,
    stacked: Tensor,
    weight: Tensor,
    bias: Tensor,
    method: ConvolutionMethod,
    rows: list[list[Tensor]] | None = None,
) -> Tensor:
    """`hoisted_convolution` of enlarged features, not differentiable. With `rows`, the `combinations` of the weight of the
    stacked ones, `weight` may be that of own alone."""
    split = own.shape[1]
    y = convolve(own, weight[:, :split], bias, method)
    if rows is None and copies_suffice(own, stacked, weight[:, split:], method):
        native = implementation("native")
        return native.conv3x3_fwd(stacked, weight[:, split:], None, copies=True, out=y, accumulate=True)
    rows = rows or combinations(weight[:, split:])
    cells = _Cells(own, stacked)
    # along a row first: what is added to the first, the inner and the last columns of a cell
    for i in range(3):
        products = [convolve(cells.difference(i, j), rows[i][j], None, method) for j in range(3)]
        for q in range(cells.factor):
            line = products[0] + products[_side(q, cells.factor)] if _side(q, cells.factor) else products[0]
            for p in cells.rows(i):
                cells.of(y, p, q).add_(line)
    return y


def copies_suffice(own: Tensor, stacked: Tensor, weight: Tensor, method: ConvolutionMethod) -> bool:
    """Whether the kernel for pixels that come in 2×2 copies serves, so that nobody needs `combinations` of the weight."""
    return own.shape[2] == 2 * stacked.shape[2] and by_winograd(stacked, weight, method)


def _backward(grads: Tensors, inputs: Tensors, _: Tensors, needed: tuple[bool, ...], method: ConvolutionMethod) -> Tensors:
    (dy,), (own, stacked, weight, bias) = grads, inputs
    split = own.shape[1]
    of_stacked = weight[:, split:]
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[2] else None
    dfirst, dlast = (None, None) if dweight is None else (dweight[:, :split], dweight[:, split:])
    of_own = (needed[0], needed[2], needed[3])
    down, _, dbias = convolution_backward(dy, own, weight[:, :split], of_own, method, dweight=dfirst)
    if copies_suffice(own, stacked, of_stacked, method):
        native, dstacked = implementation("native"), None
        if needed[1]:
            dstacked = native.conv3x3_bwd_input(dy, of_stacked, copies=True)
        if dlast is not None:
            native.conv3x3_bwd_weight(dy, stacked, copies=True, out=dlast)
    else:
        dstacked, dcombined = _products_backward(dy, own, stacked, combinations(of_stacked), needed[1:3], method)
        if dlast is not None:
            dlast.copy_(_combinations_backward(dcombined))
    return down, dstacked, dweight, None if dbias is None else dbias.to(bias.dtype)


def _products_backward(
    dy: Tensor, own: Tensor, stacked: Tensor, rows: list[list[Tensor]], needed: tuple[bool, ...], method: ConvolutionMethod
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of the stacked features and of the combinations."""
    dstacked = torch.zeros_like(stacked) if needed[0] else None
    dcombined: list[list[Tensor | None]] = [[None] * 3 for _ in range(3)]
    cells = _Cells(own, stacked)
    for i in range(3):
        lines = [_sum([cells.of(dy, p, q) for p in cells.rows(i)]) for q in range(cells.factor)]
        for j in range(3):
            dproduct = lines[0] if j == 1 else lines[-1] if j == 2 else _sum(lines)
            dx, dcombined[i][j], _ = convolution_backward(
                dproduct, cells.difference(i, j), rows[i][j], (*needed, False), method
            )
            if dx is not None:
                dstacked += _difference_backward(_difference_backward(dx, j, 3), i, 2)
    return dstacked, dcombined


class _Cells:
    """The f×f cells of a level's tensors that belong to one stacked pixel each, and the differences of those pixels."""

    def __init__(self, own: Tensor, stacked: Tensor) -> None:
        self.factor, self._stacked = own.shape[2] // stacked.shape[2], stacked

    def of(self, x: Tensor, p: int, q: int) -> Tensor:
        """The pixels of x at row p and column q of every cell: (B, N, h', w'), a view."""
        return x[:, :, p :: self.factor, q :: self.factor]

    def rows(self, i: int) -> list[int]:
        """The rows of a cell that product i of the rows is added to: S all, A the first, C the last."""
        return [list(range(self.factor)), [0], [self.factor - 1]][i]

    def difference(self, i: int, j: int) -> Tensor:
        """What product (i, j) multiplies: b, a - b or c - b along the rows, and the same of that along the columns."""
        return _difference(_difference(self._stacked, i, 2), j, 3)


def _sum(parts: list[Tensor]) -> Tensor:
    """Dense; `sum` would add the first to 0."""
    total = parts[0].clone() if len(parts) == 1 else parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _side(q: int, factor: int) -> int:
    """Which product beside S column q of a cell gets: A the first, C the last, none an inner one."""
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
    """The transpose of `_difference`: what one looked at before, the other looks at after."""
    return _difference(dy, (0, 2, 1)[kind], axis)


def combinations(weight: Tensor) -> list[list[Tensor]]:
    """The 1×1 weights (N, s, 1, 1) of the nine products, dense: sums over the window, or its first or last row or column."""
    return [[part.contiguous()[:, :, None, None] for part in _sum_and_ends(row)] for row in _sum_and_ends(weight)]


def _sum_and_ends(weight: Tensor) -> list[Tensor]:
    """Along dimension 2, of three elements: their sum (by additions, ten times faster than `sum`), the first, the last."""
    first, middle, last = weight.unbind(2)
    return [first + middle + last, first, last]


def _combinations_backward(grads: list[list[Tensor]]) -> Tensor:
    """Gradient (N, s, 3, 3) of the weight: each of its elements is in the sums, and the outer ones in a product more."""
    rows = [_spread([part[:, :, 0, 0] for part in row]) for row in grads]
    return _spread(rows)


def _spread(grads: list[Tensor]) -> Tensor:
    """Gradients of (w0 + w1 + w2, w0, w2) → the gradient of (w0, w1, w2), along a new dimension 2."""
    total, first, last = grads
    return torch.stack([total + first, total, total + last], dim=2)


_enlarged = Piece("EnlargedConvolution", forward=_forward, backward=_backward, reference=_reference)
