"""Split with a conditional Gaussian prior: half of the state leaves the flow as a latent (Glow, SRFlow)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsr_fast.ops._contract import check_state, check_tensors, compute_dtype, resolve_backend


def gaussian_split(z: Tensor, h: Tensor, *, inverse: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`y = (z1, eps)` with `eps = (z2 - mean) / exp(logs)`, or its inverse `z2 = mean + exp(logs) · eps`.

    z        (B, C, H, W): z1 is its first C - C_out channels, z2 (for the inverse, eps) the last C_out
    h        (B, 2·C_out, H, W), `mean, logs = h[:, 0::2], h[:, 1::2]`; in a flow it depends on z1 alone
    returns  y (B, C, H, W) in the dtype of z, the channels of z1 followed by those of eps, and logdet (B,):
             the Gaussian log-density `Σ log N(z2; mean, exp(logs)²)` in nats, its negative for the inverse

    The log-density already contains the change of variables from z2 to eps, so a flow adds it and
    nothing else for this latent. Computed in float32, or in float64 for float64 z. Differentiable with
    respect to z and h. Raises ValueError or TypeError naming the argument for a wrong shape, dtype or
    device.
    """
    batch, channels, height, width = check_state("gaussian_split", "z", z)
    if not isinstance(h, Tensor) or h.dim() != 4 or h.shape[1] % 2 or not 0 < h.shape[1] // 2 < channels:
        shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"gaussian_split: h must have shape (B, 2·C_out, H, W) with 0 < C_out < {channels}, not {shape}")
    consumed = h.shape[1] // 2
    check_tensors(
        "gaussian_split",
        {"z": (z, tuple(z.shape)), "h": (h, (batch, 2 * consumed, height, width))},
        like="z",
    )
    resolve_backend("gaussian_split", backend)
    dtype = compute_dtype(z)
    mean, logs = h[:, 0::2].to(dtype), h[:, 1::2].to(dtype)
    z1, last = z[:, :-consumed], z[:, -consumed:].to(dtype)
    eps = last if inverse else (last - mean) * torch.exp(-logs)
    logdet = (gaussian_log_density(eps) - logs).sum(dim=(1, 2, 3))
    if inverse:
        return torch.cat([z1, (mean + torch.exp(logs) * eps).to(z.dtype)], dim=1), -logdet
    return torch.cat([z1, eps.to(z.dtype)], dim=1), logdet


def gaussian_log_density(eps: Tensor) -> Tensor:
    """log N(eps; 0, 1) of every element, in nats."""
    return -0.5 * (eps * eps + math.log(2 * math.pi))
