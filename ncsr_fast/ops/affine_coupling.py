"""Affine coupling: the second half of the channels shifted and scaled (Real NVP, Dinh et al. 2017)."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.ops._backends import resolve_backend
from ncsr_fast.ops._contract import check_eps, check_state, check_tensors
from ncsr_fast.ops.affine_injector import affine


def affine_coupling(
    z: Tensor, h: Tensor, eps: float = 1e-4, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`y1 = z1`, `y2 = (z2 + shift) · scale`, or its inverse; z1 is the first C//2 channels.

    z        (B, C, H, W)
    h        (B, 2(C - C//2), H, W), shift and raw scale interleaved as for `affine_injector`; in a flow
             it depends on z1 alone, which this function neither knows nor needs
    returns  y (B, C, H, W) in the dtype of z, and logdet (B,) = ±Σ log scale

    Computed in float32, or in float64 for float64 z. Differentiable with respect to z and h, which are all that is
    saved for it. Raises ValueError or TypeError naming the argument for a wrong shape, dtype, device or eps.
    """
    batch, channels, height, width = check_state("affine_coupling", "z", z)
    kept = channels // 2
    check_tensors("affine_coupling", z, ("h", h, (batch, 2 * (channels - kept), height, width)))
    check_eps("affine_coupling", eps)
    return affine(z, h, kept, eps, inverse, resolve_backend("affine_coupling", backend, z))
