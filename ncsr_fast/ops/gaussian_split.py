"""Split with a conditional Gaussian prior: half of the state leaves the flow as a latent (Glow, SRFlow)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsr_fast.ops._backends import implementation, resolve_backend
from ncsr_fast.ops._contract import check_state, check_tensors, compute_dtype
from ncsr_fast.ops._operator import Operator


def gaussian_split(z: Tensor, h: Tensor, *, inverse: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`y = (z1, eps)` with `eps = (z2 - mean) / exp(logs)`, or its inverse `z2 = mean + exp(logs) · eps`.

    z        (B, C, H, W): z1 is its first C - C_out channels, z2 (for the inverse, eps) the last C_out
    h        (B, 2·C_out, H, W), `mean, logs = h[:, 0::2], h[:, 1::2]`; in a flow it depends on z1 alone
    returns  y (B, C, H, W) in the dtype of z, the channels of z1 followed by those of eps, and logdet (B,):
             the Gaussian log-density `Σ log N(z2; mean, exp(logs)²)` in nats, its negative for the inverse

    The log-density already contains the change of variables from z2 to eps, so a flow adds it and
    nothing else for this latent. Computed in float32, or in float64 for float64 z. Differentiable with
    respect to z and h, which are all that is saved for it. Raises ValueError or TypeError naming the
    argument for a wrong shape, dtype or device.
    """
    batch, channels, height, width = check_state("gaussian_split", "z", z)
    if not isinstance(h, Tensor) or h.dim() != 4 or h.shape[1] % 2 or not 0 < h.shape[1] // 2 < channels:
        shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"gaussian_split: h must have shape (B, 2·C_out, H, W) with 0 < C_out < {channels}, not {shape}")
    check_tensors("gaussian_split", z, ("h", h, (batch, h.shape[1], height, width)))
    return _gaussian(z, h, inverse, resolve_backend("gaussian_split", backend, z))


def gaussian_log_density(eps: Tensor) -> Tensor:
    """log N(eps; 0, 1) of every element, in nats."""
    return -0.5 * (eps * eps + math.log(2 * math.pi))


def _reference(z: Tensor, h: Tensor, inverse: bool, _: str) -> tuple[Tensor, Tensor]:
    consumed, dtype = h.shape[1] // 2, compute_dtype(z)
    mean, logs = h[:, 0::2].to(dtype), h[:, 1::2].to(dtype)
    z1, last = z[:, :-consumed], z[:, -consumed:].to(dtype)
    eps = last if inverse else (last - mean) * torch.exp(-logs)
    logdet = (gaussian_log_density(eps) - logs).sum(dim=(1, 2, 3))
    if inverse:
        return torch.cat([z1, (mean + torch.exp(logs) * eps).to(z.dtype)], dim=1), -logdet
    return torch.cat([z1, eps.to(z.dtype)], dim=1), logdet


def _forward(z: Tensor, h: Tensor, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    y, logdet = implementation(backend).gaussian_fwd(z, h, inverse)
    return y, logdet


def _backward(dy: Tensor, dlogdet: Tensor, _: None, z: Tensor, h: Tensor, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    dz, dh = implementation(backend).gaussian_bwd(dy, dlogdet, z, h, inverse)
    return dz, dh


_gaussian = Operator(
    "gaussian",
    "Tensor z, Tensor h",
    "bool inverse, str backend",
    forward=_forward,
    backward=_backward,
    reference=_reference,
)
