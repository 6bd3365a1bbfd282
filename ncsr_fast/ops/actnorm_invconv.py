"""Actnorm followed by an invertible 1×1 convolution (Kingma & Dhariwal 2018, sections 3.1 and 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.ops._contract import check_state, check_tensors, compute_dtype, resolve_backend


def actnorm_invconv(
    x: Tensor, bias: Tensor, logs: Tensor, weight: Tensor, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`y = weight · ((x + bias) · exp(logs))` at every pixel, or its inverse.

    x        (B, C, H, W)
    bias     (C,)
    logs     (C,)
    weight   (C, C), rows are output channels
    returns  y (B, C, H, W) in the dtype of x, and logdet (B,) = ±H·W·(Σ logs + log|det weight|)

    Computed in float32, or in float64 for float64 x; the inverse of `weight` always in float64.
    Differentiable with respect to every tensor. Raises ValueError when `inverse` meets a weight that
    is singular or not finite, and ValueError or TypeError naming the argument for a wrong shape,
    dtype or device.
    """
    _, channels, _, _ = check_state("actnorm_invconv", "x", x)
    check_tensors(
        "actnorm_invconv",
        {
            "x": (x, tuple(x.shape)),
            "bias": (bias, (channels,)),
            "logs": (logs, (channels,)),
            "weight": (weight, (channels, channels)),
        },
        like="x",
    )
    resolve_backend("actnorm_invconv", backend)
    return _reference(x, bias, logs, weight, inverse)


def _reference(x: Tensor, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    batch, _, height, width = x.shape
    bias, logs, weight = bias.to(dtype), logs.to(dtype), weight.to(dtype)
    logdet = (logs.sum() + torch.linalg.slogdet(weight)[1]) * (height * width)
    pixels = x.to(dtype).flatten(2)
    if inverse:
        # x = exp(-logs) · weight⁻¹ · y - bias
        mix = torch.exp(-logs)[:, None] * inverse_weight(weight)
        y, logdet = mix @ pixels - bias[:, None], -logdet
    else:
        mix = weight * torch.exp(logs)
        y = mix @ (pixels + bias[:, None])
    return y.view(x.shape).to(x.dtype), logdet.expand(batch)


def inverse_weight(weight: Tensor) -> Tensor:
    """weight⁻¹ through float64, as the published program does; ValueError when there is none.

    Singular means singular to rounding: a condition number of at least 1 / (C · eps) of float64, where the inverse
    has no correct digit.
    """
    exact = weight.double()
    result, _ = torch.linalg.inv_ex(exact)
    condition = torch.linalg.matrix_norm(exact, torch.inf) * torch.linalg.matrix_norm(result, torch.inf)
    limit = 1 / (weight.shape[-1] * torch.finfo(torch.float64).eps)
    if not condition < limit:  # NaN included
        raise ValueError(
            f"actnorm_invconv: weight is singular or not finite (condition number {condition.item():.1e}), "
            "so the 1×1 convolution has no inverse"
        )
    return result.to(weight.dtype)
