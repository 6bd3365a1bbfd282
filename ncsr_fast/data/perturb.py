"""The degradation of HR images to LR images, and NCSR's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.data.low_light import low_light_input
from ncsr_fast.metrics.imresize import imresize


def degrade(hr: Tensor, scale: int) -> Tensor:
    """uint8 LR images of uint8 HR images by MATLAB's bicubic, as in the LR files of benchmarks."""
    return imresize(hr, 1 / scale)


def to_pair(batch: dict[str, Tensor], scale: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """A batch of `RandomCrops` → (hr, lr) in [0, 1] on `device`, lr computed there when the batch has none.

    Of a batch with equalized crops, lr are the six channels of `low_light_input`.
    """
    images = {name: image.to(device, non_blocking=True) for name, image in batch.items()}
    hr = images["hr"]
    if "equalized" in images:
        return to_float(hr), low_light_input(images["lr"], images["equalized"])
    return to_float(hr), to_float(images["lr"] if "lr" in images else degrade(hr, scale))


def perturb(
    hr: Tensor,
    lr: Tensor,
    max_std: float,
    generator: torch.Generator | None = None,
    *,
    noise_channels: int = 3,
    fixed_std: bool = False,
    lr_noise: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add NCSR's noise: `v ~ N(0, c²I)` with `c ~ U(0, max_std)` for each image, and its LR counterpart.

    Source: Kim & Son 2021; the resize is MATLAB's bicubic, as in the published program.

    Args:
        hr: (B, 3, sH, sW).
        lr: (B, 3, H, W), on the same device.
        max_std: Largest standard deviation of the noise.
        generator: A generator on that device; None is torch's default generator.
        noise_channels: Channels of the noise condition, as in `NCSRConfig.noise_channels`.
        fixed_std: True: c is max_std for every image, as SRFlow-DA has it.
        lr_noise: False leaves lr as it is; then it may be anything that the images of hr are conditioned on.

    Returns:
        hr + v, lr + imresize(v, 1/s), and the noise condition: v (B, 3, sH, sW), c (B, 1, 1, 1) when noise_channels is 1,
        None when it is 0.

    Raises:
        ValueError: The sizes of hr are not an integer multiple of those of lr, or max_std is negative.

    Example:
        >>> hr, lr = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8)
        >>> noisy_hr, noisy_lr, noise = perturb(hr, lr, max_std=0.05)
    """
    if not max_std >= 0:
        raise ValueError(f"max_std must not be negative, not {max_std!r}")
    options = {"generator": generator, "dtype": hr.dtype, "device": hr.device}
    share = torch.rand(hr.shape[0], 1, 1, 1, **options)
    std = max_std * (torch.ones_like(share) if fixed_std else share)
    return perturbed(hr, lr, std, torch.randn(hr.shape, **options), noise_channels=noise_channels, lr_noise=lr_noise)


def perturbed(
    hr: Tensor, lr: Tensor, std: Tensor, normal: Tensor, *, noise_channels: int = 3, lr_noise: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`perturb` with given random numbers: std c (B, 1, 1, 1) and `normal` (B, 3, sH, sW), v = c · normal.

    Returns:
        hr + v, lr + imresize(v, 1/s), and the noise condition: v, c or None for noise_channels 3, 1 or 0. Without
        `lr_noise` lr itself.

    Raises:
        ValueError: The sizes of hr are not an integer multiple of those of lr.
    """
    noise = std * normal
    condition = {3: noise, 1: std, 0: None}[noise_channels]
    if not lr_noise:
        return hr + noise, lr, condition
    scale = hr.shape[-1] // lr.shape[-1]
    if tuple(hr.shape) != (lr.shape[0], lr.shape[1], lr.shape[2] * scale, lr.shape[3] * scale):
        raise ValueError(f"hr {tuple(hr.shape)} is not an integer multiple of lr {tuple(lr.shape)}")
    return hr + noise, lr + imresize(noise, 1 / scale), condition
