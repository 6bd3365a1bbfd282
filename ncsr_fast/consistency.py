"""Samples put onto the LR image: the smallest change after which MATLAB's bicubic reduction of them is that image.

With the reduction A the samples that reduce to lr are an affine space, and the point of it nearest to x is

    x + Aᵀ (A Aᵀ)⁻¹ (lr - A x).

A works on rows and columns, x ↦ R x Cᵀ, so that A Aᵀ is inverted by the two small matrices R Rᵀ and C Cᵀ. Images are in [0, 1]
too, which the nearest point need not be: the two sets are projected onto in turn.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.autocast import without_autocast
from ncsr_fast.metrics.imresize import resizing_matrix
from ncsr_fast.precision import product

ROUNDS = 16  # of the two projections; of a photograph's samples few pixels leave [0, 1] in the first


def projected(images: Tensor, lr: Tensor, scale: int, rounds: int = ROUNDS) -> Tensor:
    """Images (B, …, C, sH, sW) in [0, 1] near the given ones, whose bicubic reduction is lr (B, C, H, W), but for clipping.

    In float32, or float64 for such images; differentiable. Images with values that are not finite stay as they are.

    Args:
        images: Samples of lr.
        lr: The LR images.
        scale: s, 2 or more.
        rounds: How often what left [0, 1] is clipped and the rest corrected.

    Raises:
        ValueError: scale is 1, or the sizes do not fit it.
    """
    if scale < 2:
        raise ValueError(f"samples of the size of the LR image cannot be put onto it: scale must be 2 or more, not {scale}")
    expected = (lr.shape[0], lr.shape[1], scale * lr.shape[2], scale * lr.shape[3])
    if (images.shape[0], *images.shape[-3:]) != expected:
        raise ValueError(f"images must have shape (B, …, C, sH, sW) as {expected}, not {tuple(images.shape)}")
    target = lr.view(lr.shape[0], *[1] * (images.dim() - 4), *lr.shape[1:])
    with without_autocast(images.device.type):
        rows, columns = (_reduction(size, scale, images.dtype, images.device) for size in images.shape[-2:])
        x = images
        for _ in range(rounds):
            error = target - product(product(rows.matrix, x), columns.matrix.T)
            x = (x + product(product(rows.inverse, error), columns.inverse.T)).clamp(0, 1)
    finite = images.isfinite().flatten(-3).all(dim=-1)
    return torch.where(finite[..., None, None, None], x, images)


class _Reduction(NamedTuple):
    """The reduction R of one axis, and its pseudoinverse R⁺ = Rᵀ (R Rᵀ)⁻¹."""

    matrix: Tensor
    inverse: Tensor


@functools.lru_cache(maxsize=16)
def _reduction(size: int, scale: int, dtype: torch.dtype, device: torch.device) -> _Reduction:
    with torch.inference_mode(False):  # cached tensors are used under autograd later
        matrix = resizing_matrix(size, 1 / scale)
        inverse = torch.linalg.solve(matrix @ matrix.T, matrix).T
        return _Reduction(matrix.to(device, dtype), inverse.to(device, dtype))
