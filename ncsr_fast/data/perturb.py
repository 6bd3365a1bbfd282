"""What turns images into what the flow is trained on: the degradation, and NCSR's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.metrics.imresize import imresize


def degrade(hr: Tensor, scale: int) -> Tensor:
    """LR images of uint8 HR images by MATLAB bicubic, uint8 as well: what a benchmark's LR files hold."""
    return imresize(hr, 1 / scale)


def to_pair(batch: dict[str, Tensor], scale: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """A batch of `RandomCrops` → (hr, lr) in [0, 1] on `device`, lr computed there when the batch has none."""
    hr = batch["hr"].to(device, non_blocking=True)
    lr = batch["lr"].to(device, non_blocking=True) if "lr" in batch else degrade(hr, scale)
    return to_float(hr), to_float(lr)


def perturb(
    hr: Tensor, lr: Tensor, max_std: float, generator: torch.Generator | None = None, *, noise_channels: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Add NCSR's noise: `v ~ N(0, c²I)` with `c ~ U(0, max_std)` for each image, and its LR counterpart.

    hr, lr          (B, 3, sH, sW) and (B, 3, H, W) on one device
    generator       of that device; None is torch's default one
    noise_channels  what the model is conditioned on (`NCSRConfig.noise_channels`)
    returns         hr + v, lr + imresize(v, 1/s), and the condition: v (B, 3, sH, sW), or c (B, 1, 1, 1) when
                    noise_channels is 1
    raises          ValueError for a pair whose sizes are no integer scale apart, or a negative max_std
    source          Kim & Son 2021; the resize is MATLAB's bicubic, as in the published program
    """
    if not max_std >= 0:
        raise ValueError(f"max_std must not be negative, not {max_std!r}")
    scale = hr.shape[-1] // lr.shape[-1]
    if tuple(hr.shape) != (lr.shape[0], lr.shape[1], lr.shape[2] * scale, lr.shape[3] * scale):
        raise ValueError(f"hr {tuple(hr.shape)} is not an integer multiple of lr {tuple(lr.shape)}")
    std = max_std * torch.rand(hr.shape[0], 1, 1, 1, generator=generator, dtype=hr.dtype, device=hr.device)
    noise = std * torch.randn(hr.shape, generator=generator, dtype=hr.dtype, device=hr.device)
    return hr + noise, lr + imresize(noise, 1 / scale), std if noise_channels == 1 else noise
