"""Affine injector: every channel shifted and scaled by what the conditioning features say (SRFlow, Lugmayr et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.ops._contract import check_state, check_tensors, compute_dtype, resolve_backend


def affine_injector(
    z: Tensor, h: Tensor, eps: float = 1e-4, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`y = (z + shift) · scale`, or its inverse `y / scale - shift`.

    z        (B, C, H, W)
    h        (B, 2C, H, W), shift and raw scale interleaved: `shift, raw = h[:, 0::2], h[:, 1::2]`,
             `scale = sigmoid(raw + 2) + eps`
    returns  y (B, C, H, W) in the dtype of z, and logdet (B,) = ±Σ log scale

    Computed in float32, or in float64 for float64 z. Differentiable with respect to z and h. Raises
    ValueError or TypeError naming the argument for a wrong shape, dtype or device.
    """
    batch, channels, height, width = check_state("affine_injector", "z", z)
    check_tensors(
        "affine_injector",
        {"z": (z, tuple(z.shape)), "h": (h, (batch, 2 * channels, height, width))},
        like="z",
    )
    resolve_backend("affine_injector", backend)
    y, logdet = affine(z.to(compute_dtype(z)), h, eps, inverse)
    return y.to(z.dtype), logdet


def affine(z: Tensor, h: Tensor, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """The map itself, on a z that already has the dtype of the arithmetic."""
    h = h.to(z.dtype)
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2) + eps
    logdet = torch.log(scale).sum(dim=(1, 2, 3))
    if inverse:
        return z / scale - shift, -logdet
    return (z + shift) * scale, logdet
