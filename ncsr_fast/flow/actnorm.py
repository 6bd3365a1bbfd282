"""Data-dependent initialisation of an actnorm (Kingma & Dhariwal 2018, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-6  # added to a channel's standard deviation by the published program


@torch.no_grad()
def initialize_actnorm(bias: Tensor, logs: Tensor, x: Tensor) -> None:
    """Set `bias` and `logs` (C,) in place so that `(x + bias) · exp(logs)` has mean 0 and variance 1.

    x is (B, C, H, W). The statistics of each channel are over the batch and all positions, with the biased
    variance: bias = -mean, logs = -log(std + 1e-6).
    """
    mean = x.mean(dim=(0, 2, 3))
    variance = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    bias.copy_(-mean)
    logs.copy_(-torch.log(variance.sqrt() + STD_FLOOR))
