"""Actnorm followed by an invertible 1×1 convolution (Kingma & Dhariwal 2018, sections 3.1 and 3.2)."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.ops.backend import resolve_backend
from ncsr_fast.ops.contract import check_state, check_tensors
from ncsr_fast.ops.flow_step import parameters, step


def actnorm_invconv(
    x: Tensor, bias: Tensor, logs: Tensor, weight: Tensor, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Normalise the channels and mix them: `y = weight · ((x + bias) · exp(logs))` at every pixel, or the inverse map.

    The map is computed in float32, or in float64 for float64 x; the inverse of `weight` always in float64. It is differentiable
    with respect to every tensor: x, y and the parameters are saved for the backward pass.

    Args:
        x: State (B, C, H, W).
        bias: (C,).
        logs: (C,).
        weight: (C, C), rows are output channels.
        inverse: Apply the inverse map.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        y (B, C, H, W) in the dtype of x, and logdet (B,) = H·W·(Σ logs + log|det weight|), the negative of it for the inverse.

    Raises:
        ValueError: `inverse` with a weight that is singular or not finite (on the CPU).
        ValueError, TypeError: A wrong shape, dtype or device; the message names the argument.

    Example:
        >>> bias, logs, weight = torch.zeros(12), torch.zeros(12), torch.eye(12)
        >>> y, logdet = ops.actnorm_invconv(torch.randn(2, 12, 8, 8), bias, logs, weight)
        >>> logdet.tolist()
        [0.0, 0.0]
    """
    _, channels, _, _ = check_state("actnorm_invconv", "x", x)
    check_tensors("actnorm_invconv", x, *parameters(channels, bias, logs, weight))
    backend = resolve_backend("actnorm_invconv", backend, x)
    # the flow step without its affines, where eps has no meaning
    return step("actnorm_invconv", x, None, bias, logs, weight, None, 1.0, inverse, backend)
