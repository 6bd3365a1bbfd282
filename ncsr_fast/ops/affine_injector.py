"""Affine injector: every channel shifted and scaled by what the conditioning features say (SRFlow, Lugmayr et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.ops._backends import implementation, resolve_backend
from ncsr_fast.ops._contract import check_eps, check_state, check_tensors
from ncsr_fast.ops._operator import Operator
from ncsr_fast.ops._reference import affine_fwd


def affine_injector(
    z: Tensor, h: Tensor, eps: float = 1e-4, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`y = (z + shift) · scale`, or its inverse `y / scale - shift`.

    z        (B, C, H, W)
    h        (B, 2C, H, W), shift and raw scale interleaved: `shift, raw = h[:, 0::2], h[:, 1::2]`,
             `scale = sigmoid(raw + 2) + eps`
    returns  y (B, C, H, W) in the dtype of z, and logdet (B,) = ±Σ log scale

    Computed in float32, or in float64 for float64 z. Differentiable with respect to z and h, which are all that is
    saved for it. Raises ValueError or TypeError naming the argument for a wrong shape, dtype, device or eps.
    """
    batch, channels, height, width = check_state("affine_injector", "z", z)
    check_tensors("affine_injector", z, ("h", h, (batch, 2 * channels, height, width)))
    check_eps("affine_injector", eps)
    return affine(z, h, 0, eps, inverse, resolve_backend("affine_injector", backend, z))


def affine(z: Tensor, h: Tensor, kept: int, eps: float, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The channels of z from `kept` on shifted and scaled by the pairs in h; the arguments have been checked."""
    return _affine(z, h, kept, eps, inverse, backend)


def _reference(z: Tensor, h: Tensor, kept: int, eps: float, inverse: bool, _: str) -> tuple[Tensor, Tensor]:
    return affine_fwd(z, h, kept, eps, inverse)


def _forward(z: Tensor, h: Tensor, kept: int, eps: float, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    y, logdet = implementation(backend).affine_fwd(z, h, kept, eps, inverse)
    return y, logdet


def _backward(
    dy: Tensor, dlogdet: Tensor, _: None, z: Tensor, h: Tensor, kept: int, eps: float, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dz, dh = implementation(backend).affine_bwd(dy, dlogdet, z, h, kept, eps, inverse)
    return dz, dh


_affine = Operator(
    "affine",
    "Tensor z, Tensor h",
    "int kept, float eps, bool inverse, str backend",
    forward=_forward,
    backward=_backward,
    reference=_reference,
)
