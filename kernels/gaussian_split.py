"""Split with a conditional Gaussian prior, one kernel per direction, for the latent and its log-density."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._elementwise import elementwise_backward, elementwise_forward

LOG_2PI = math.log(2 * math.pi)


@triton.jit
def gaussian_map(x, mean, logs, log_2pi, INVERSE: tl.constexpr):
    """eps = (x - mean)·exp(-logs) with term -½(eps² + log 2π) - logs; inverse x = mean + exp(logs)·eps with its negative."""
    if INVERSE:
        return mean + tl.exp(logs) * x, 0.5 * (x * x + log_2pi) + logs
    else:
        b_eps = (x - mean) * tl.exp(-logs)
        return b_eps, -0.5 * (b_eps * b_eps + log_2pi) - logs


@triton.jit
def gaussian_map_backward(dy, g, x, mean, logs, log_2pi, INVERSE: tl.constexpr):
    """dx, dmean and dlogs.

    With e = dy - g·eps: dx = e·exp(-logs), dmean = -dx, dlogs = -e·eps - g.
    Inverse, x being eps: dx = dy·exp(logs) + g·x, dmean = dy, dlogs = dy·exp(logs)·x + g.
    """
    if INVERSE:
        b_scaled = dy * tl.exp(logs)
        return b_scaled + g * x, dy, b_scaled * x + g
    else:
        b_eps = (x - mean) * tl.exp(-logs)
        b_e = dy - g * b_eps
        b_dx = b_e * tl.exp(-logs)
        return b_dx, -b_dx, -b_e * b_eps - g


def gaussian_split_forward(x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet); h (B, 2m, H, W) holds mean and log standard deviation of the last m channels, interleaved."""
    return elementwise_forward(x, h, x.shape[1] - h.shape[1] // 2, LOG_2PI, gaussian_map, inverse)


def gaussian_split_backward(dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(dx, dh) from the inputs of `gaussian_split_forward`."""
    return elementwise_backward(dy, dlogdet, x, h, x.shape[1] - h.shape[1] // 2, LOG_2PI, gaussian_map_backward, inverse)
