"""How close a super-resolved image is: to the original (PSNR, SSIM), and to the LR image it came from (LR-PSNR)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.metrics.imresize import imresize

TO_8BIT = ("round", "truncate")


def to_uint8(image: Tensor, to_8bit: str = "round") -> Tensor:
    """Floats in [0, 1], clipped, as 8 bits; uint8 as it is. The one place of the package where floats become 8 bits.

    Args:
        image: Of any shape, finite.
        to_8bit: "round" to the nearest level, or "truncate" to the level below, as the published test programs do:
            `(clip(x, 0, 1) * 255).astype(uint8)`. Truncation darkens by half a level and costs 2 dB of LR-PSNR at 50 dB.

    Returns:
        uint8, of the shape of `image`.

    Raises:
        ValueError: Another word for `to_8bit`.
    """
    check_to_8bit(to_8bit)
    if image.dtype == torch.uint8:
        return image
    levels = image.clamp(0, 1).mul(255)
    return (levels.round() if to_8bit == "round" else levels).to(torch.uint8)


def check_to_8bit(to_8bit: str) -> None:
    """Raise ValueError unless it is "round" or "truncate"."""
    if to_8bit not in TO_8BIT:
        raise ValueError(f"to_8bit must be one of {', '.join(map(repr, TO_8BIT))}, not {to_8bit!r}")


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of 8-bit images, `10 log10(255² / MSE)` over all channels.

    Args:
        image: (B, 3, H, W), uint8, or floats in [0, 1], which are rounded to 8 bits first.
        target: Likewise.

    Returns:
        (B,) float64; infinite for equal images.
    """
    image, target = to_uint8(image), to_uint8(target)
    if image.shape != target.shape:
        raise ValueError(f"image {tuple(image.shape)} and target {tuple(target.shape)} differ in shape")
    error = (image.double() - target.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255**2 / error)


def lr_psnr(sr: Tensor, lr: Tensor, scale: int) -> Tensor:
    """PSNR (B,) in dB between `lr` and the 8-bit `sr` downsampled by MATLAB bicubic: is it a solution at all?

    sr (B, 3, sH, sW), lr (B, 3, H, W), as for `psnr`. The NTIRE 2021 protocol; it asks for at least 45 dB.
    """
    return psnr(imresize(to_uint8(sr), 1 / scale), lr)


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (B,) of 8-bit RGB images, by scikit-image with its 7×7 uniform window.

    Arguments as for `psnr`; sides of at least 7. The setting of SRFlow's measurements. Needs scikit-image.
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
