"""Perceptual distance and the diversity of samples, as the NTIRE 2021 challenge measures them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.precision import true_float32


def diversity_score(distances: Tensor) -> float:
    """The gain in percent of choosing the best sample at every pixel over the best single sample (0 if all are the same).

    Source: the NTIRE 2021 "Learning the Super-Resolution Space" toolkit.

    Args:
        distances: (n, H, W), a map of each sample's distance to the original; lower is better. LPIPS maps (`lpips`) give the
            challenge's score.

    Returns:
        `100 · (global - local) / global`: `global` is the smallest mean of a map, `local` the mean of the pixelwise
        smallest distance.
    """
    if distances.dim() != 3 or distances.shape[0] < 1:
        raise ValueError(f"distances must have shape (n, H, W) with n ≥ 1, not {tuple(distances.shape)}")
    best = distances.flatten(1).mean(dim=1).min()
    local = distances.min(dim=0).values.mean()
    return float(100 * (best - local) / best) if best > 0 else 0.0


def error_maps(samples: Tensor, target: Tensor, window: int = 16) -> Tensor:
    """Mean squared error of each sample (n, 3, H, W) to `target` (3, H, W) in the windows of a grid, (n, h, w).

    `diversity_score` can be computed from these maps without LPIPS; it is then not comparable to published scores.
    """
    error = (samples - target).square().mean(dim=1, keepdim=True)
    window = min(window, *error.shape[2:])
    return F.avg_pool2d(error, window)[:, 0]


class LPIPSUnavailable(RuntimeError):
    """LPIPS cannot be computed here; the message says why."""


def lpips_model(network: str = "alex", device: torch.device | str = "cpu"):
    """The LPIPS network (Zhang et al. 2018), spatial, from the `lpips` package.

    Raises:
        LPIPSUnavailable: The package, torchvision or the backbone's weights (a download) are missing.
    """
    try:
        import lpips as package
    except ImportError as error:
        raise LPIPSUnavailable(f"LPIPS needs the lpips package: pip install 'ncsr_fast[eval]' ({error})") from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise LPIPSUnavailable(f"LPIPS needs a torchvision that fits torch {torch.__version__}: {error}") from error
    try:
        return package.LPIPS(net=network, spatial=True, verbose=False).to(device).eval()
    except OSError as error:
        raise LPIPSUnavailable(f"LPIPS could not download the weights of {network!r}: {error}") from error


@torch.no_grad()
def lpips(samples: Tensor, target: Tensor, model) -> Tensor:
    """LPIPS maps (n, H, W) of `samples` (n, 3, H, W) against `target` (3, H, W), floats in [0, 1].

    Args:
        samples: (n, 3, H, W).
        target: (3, H, W).
        model: From `lpips_model`; the mean of a map is the LPIPS distance of that sample.

    Raises:
        ValueError: The images are too small for the network.
    """
    try:
        with true_float32(samples):
            maps = model(samples * 2 - 1, (target * 2 - 1).expand_as(samples))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"LPIPS cannot measure images of {target.shape[1]}×{target.shape[2]} pixels: {error}") from error
    return maps[:, 0]
