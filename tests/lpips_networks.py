"""LPIPS networks of tests: random ones, and a distance that stands for one."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ncsr_fast.metrics.perceptual import lpips_package


def random_network() -> nn.Module:
    """LPIPS with AlexNet's weights drawn from seed 0, and its own linear layers."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of how lpips calls it
        return lpips_package().LPIPS(net="alex", spatial=True, pnet_rand=True, verbose=False).eval()


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Stands for a network: inputs in [-1, 1], one map an image."""
    assert a.min() >= -1 and a.max() <= 1
    return (a - b).square().mean(dim=1, keepdim=True)
