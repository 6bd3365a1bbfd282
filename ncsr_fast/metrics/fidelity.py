"""Fidelity of a super-resolved image to the original (PSNR, SSIM) and to its LR image (LR-PSNR)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.metrics.imresize import imresize


def to_uint8(image: Tensor) -> Tensor:
    """The image as uint8: floats in [0, 1] are clipped and rounded, uint8 is unchanged."""
    return image if image.dtype == torch.uint8 else image.mul(255).round().clamp(0, 255).to(torch.uint8)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of 8-bit images, `10 log10(255² / MSE)` over all channels.

    Args:
        image: (B, 3, H, W), uint8, or floats in [0, 1], which are rounded to 8 bits first.
        target: As `image`.

    Returns:
        (B,) float64; infinite for equal images.
    """
    image, target = to_uint8(image), to_uint8(target)
    if image.shape != target.shape:
        raise ValueError(f"image {tuple(image.shape)} and target {tuple(target.shape)} differ in shape")
    error = (image.double() - target.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255**2 / error)


def lr_psnr(sr: Tensor, lr: Tensor, scale: int) -> Tensor:
    """PSNR (B,) in dB between `lr` and the 8-bit `sr` downsampled by MATLAB's bicubic: the consistency with the LR image.

    sr is (B, 3, sH, sW) and lr (B, 3, H, W), as for `psnr`. The protocol is that of NTIRE 2021, which requires 45 dB.
    """
    return psnr(imresize(to_uint8(sr), 1 / scale), lr)


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (B,) of 8-bit RGB images, by scikit-image with its 7×7 uniform window.

    The arguments are those of `psnr`, with sides of at least 7. SRFlow's measurements have this setting. Needs scikit-image.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("ssim needs scikit-image: pip install 'ncsr_fast[eval]'") from error
    pairs = zip(to_uint8(image), to_uint8(target))
    values = [
        structural_similarity(
            a.permute(1, 2, 0).cpu().numpy(), b.permute(1, 2, 0).cpu().numpy(), channel_axis=2, data_range=255
        )
        for a, b in pairs
    ]
    return torch.tensor(values, dtype=torch.float64, device="cpu")
