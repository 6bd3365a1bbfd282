"""MATLAB's bicubic `imresize`, antialiased when it shrinks: the degradation of super-resolution benchmarks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ncsr_fast.autocast import without_autocast
from ncsr_fast.layout import traced
from ncsr_fast.precision import product

_BAND = 32  # rows of a matrix whose columns that are not zero are multiplied at once


def imresize(x: Tensor, scale: float) -> Tensor:
    """Resize the last two axes by `scale` with the bicubic kernel a = -0.5, as MATLAB's `imresize` does.

    Borders are mirrored (the edge pixel is repeated). The resize is two matrix products, rows first, in float64 for
    float64 and uint8 input and in float32 otherwise, and is differentiable. A uint8 image is rounded and clipped after
    each product, as in MATLAB. Raises ValueError for scale ≤ 0, TypeError for another integer dtype.

    Args:
        x: (…, H, W), floating point, or uint8.
        scale: Output size = ceil(scale · input size); below 1 the kernel is widened by 1/scale.

    Returns:
        (…, ⌈scale·H⌉, ⌈scale·W⌉) on the device and in the dtype of x.

    Example:
        >>> tuple(imresize(torch.rand(3, 64, 48), 1 / 4).shape)
        (3, 16, 12)
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale!r}")
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x must have shape (…, H, W) with H, W ≥ 1, not {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return _resize_8bit(x, scale)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point or uint8, not {x.dtype}")
    image = x if x.dtype == torch.float64 else x.float()
    with without_autocast(x.device.type):
        return _resize_columns(_resize_rows(image, scale), scale).to(x.dtype)


def _resize_8bit(x: Tensor, scale: float) -> Tensor:
    """Both passes, each rounded; float64, since exact halves must round as in NumPy, and float32 weights would miss some."""
    rows = [product(part, x[..., taps, :].double()) for part, taps in _bands(x, x.shape[-2], scale)]
    image = torch.cat(rows, dim=-2).round_().clamp_(0, 255)
    columns = [product(image[..., taps], part.T) for part, taps in _bands(x, x.shape[-1], scale)]
    return torch.cat(columns, dim=-1).round_().clamp_(0, 255).to(torch.uint8)


def _bands(x: Tensor, size: int, scale: float) -> Iterator[tuple[Tensor, slice]]:
    """The float64 matrix that resizes an axis by bands of its rows, each with the range of its columns that are not zero.

    On a GPU it is one band: the products saved cost less than the launches.
    """
    make = _matrix.__wrapped__ if traced() else _matrix
    matrix = make(size, scale, torch.float64, x.device)
    band = _BAND if x.device.type == "cpu" else len(matrix)
    reach = math.ceil(2 / min(scale, 1.0)) + 1  # taps to either side of a centre
    for top in range(0, len(matrix), band):
        end = min(top + band, len(matrix))
        low, high = math.floor(top / scale) - reach, math.ceil(end / scale) + reach
        # taps beyond a border are mirrored
        taps = slice(max(0, min(low, 2 * size - high)), min(size, max(high, -low)))
        yield matrix[top:end, taps], taps


def _resize_rows(x: Tensor, scale: float) -> Tensor:
    return product(_matrix_for(x, x.shape[-2], scale), x)


def _resize_columns(x: Tensor, scale: float) -> Tensor:
    return product(x, _matrix_for(x, x.shape[-1], scale).T)


def _matrix_for(x: Tensor, size: int, scale: float) -> Tensor:
    make = _matrix.__wrapped__ if traced() else _matrix  # a traced matrix has no values, or is part of a graph
    return make(size, scale, x.dtype, x.device)


@functools.lru_cache(maxsize=256)
def _matrix(size: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The (⌈scale·size⌉, size) matrix that resizes one axis. It is cached, because training uses few sizes."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used under autograd later
        return resizing_matrix(size, scale).to(device=device, dtype=dtype)


def resizing_matrix(size: int, scale: float) -> Tensor:
    """The (⌈scale·size⌉, size) matrix that `imresize` multiplies an axis by, in float64 on the CPU."""
    options = {"dtype": torch.float64, "device": "cpu"}
    shrink = min(scale, 1.0)
    width = 4.0 / shrink
    out = math.ceil(scale * size)
    centre = torch.arange(1, out + 1, **options) / scale + 0.5 * (1 - 1 / scale)  # counted from 1
    left = torch.floor(centre - width / 2)
    taps = left[:, None] + torch.arange(math.ceil(width) + 2, **options)
    weights = _cubic((centre[:, None] - taps) * shrink) * shrink
    weights /= weights.sum(dim=1, keepdim=True)
    period = (taps.long() - 1) % (2 * size)  # mirrored: 0 … size-1, size-1 … 0
    columns = torch.where(period < size, period, 2 * size - 1 - period)
    return torch.zeros(out, size, **options).scatter_add_(1, columns, weights)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981)."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))
