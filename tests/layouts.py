"""The same values lying in memory in every way there is, NaN around them."""

from __future__ import annotations

import torch
from torch import Tensor


def _around(x: Tensor, strides: tuple[int, ...], offset: int = 5) -> Tensor:
    """x in a buffer of NaN at these strides."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides)) if x.numel() else 0
    buffer = torch.full((offset + reach + 6,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view


def _dense_strides(x: Tensor, order: list[int], gap: int = 0) -> tuple[int, ...]:
    """Strides with the dimensions from outer to inner as in `order`, and `gap` elements between the runs of each."""
    strides, step = [0] * x.dim(), 1 + gap
    for dimension in reversed(order):
        strides[dimension] = step
        step = step * max(1, x.shape[dimension]) + gap
    return tuple(strides)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.clone(memory_format=formats[x.dim()]) if x.dim() in formats else x.clone()


def _strange_single(x: Tensor) -> Tensor:
    """Dimensions of one element, whose stride means nothing, with a large one, or that of channels-last."""
    strides = [7 if size == 1 else stride for size, stride in zip(x.shape, x.contiguous().stride())]
    return _around(x, tuple(strides))


LAYOUTS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": _channels_last,
    "offset": lambda x: _around(x, x.contiguous().stride(), offset=3),
    "reversed": lambda x: _around(x, _dense_strides(x, list(range(x.dim()))[::-1])),
    "transposed": lambda x: _around(x, _dense_strides(x, [*range(x.dim())][:-2] + [*range(x.dim())][-2:][::-1])),
    "sliced": lambda x: _around(x, _dense_strides(x, list(range(x.dim())), gap=1)),
    "channels of channels_last": lambda x: (
        _channels_last(torch.cat([x, x.new_full(x.shape, float("nan"))], dim=1))[:, : x.shape[1]] if x.dim() == 4 else x.clone()
    ),
    "negative": lambda x: torch._neg_view(-x),
    "negative channels_last": lambda x: torch._neg_view(_channels_last(-x)),
    "strange single": _strange_single,
}


# of an image that a kernel reads or writes through its strides: dense ones, and parts of larger ones
IMAGES = ("contiguous", "channels_last", "channels of channels_last", "sliced", "transposed")


def laid_out(x: Tensor | None, layout: str) -> Tensor | None:
    """A leaf like x, detached."""
    return None if x is None else LAYOUTS[layout](x.detach()).detach().requires_grad_(x.requires_grad)
