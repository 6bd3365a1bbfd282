"""Fidelity of a super-resolved image to the original (PSNR, SSIM) and to its LR image (LR-PSNR)."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.metrics.imresize import imresize

TO_8BIT = ("round", "truncate")
_WINDOW = 7  # side of SSIM's uniform window
_BAND = 16  # rows of windows that SSIM is computed for at a time on a CPU: of a 2K image they fit the cache
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # SSIM's constants for 8 bits (Wang et al. 2004)


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
    image, target = _same_shape(to_uint8(image), to_uint8(target))
    squares = (image.to(torch.int32) - target).square_().flatten(1)  # exact
    return 10 * torch.log10(255**2 / (squares.sum(dim=1).double() / squares.shape[1]))


def lr_psnr(sr: Tensor, lr: Tensor, scale: int) -> Tensor:
    """PSNR (B,) in dB between `lr` and the 8-bit `sr` downsampled by MATLAB's bicubic: the consistency with the LR image.

    sr is (B, 3, sH, sW) and lr (B, 3, H, W), as for `psnr`. The protocol is that of NTIRE 2021, which requires 45 dB.
    """
    return psnr(imresize(to_uint8(sr), 1 / scale), lr)


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (B,) of 8-bit RGB images (Wang et al. 2004), with a uniform window of 7×7 pixels.

    The setting of SRFlow's measurements, and scikit-image's default: sample covariances, the mean over the channels and over
    the windows that lie in the image. On the device of the images, a channel at a time.

    Args:
        image: (B, 3, H, W), as for `psnr`; sides of at least 7.
        target: Likewise.

    Returns:
        (B,) float64 on the CPU.

    Raises:
        ValueError: Shapes that differ, or images smaller than the window.
    """
    image, target = _same_shape(to_uint8(image), to_uint8(target))
    if min(image.shape[-2:]) < _WINDOW:
        raise ValueError(f"ssim needs sides of at least {_WINDOW}, not {tuple(image.shape[-2:])}")
    means = [torch.stack([_similarity(x, y) for x, y in zip(*pair)]).mean() for pair in zip(image, target)]
    return torch.stack(means).cpu() if means else torch.zeros(0, dtype=torch.float64, device="cpu")


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """Mean similarity of the windows of two channels (H, W) of 8 bits, by bands of rows."""
    height, width = (side - _WINDOW + 1 for side in x.shape)
    band = _BAND if x.device.type == "cpu" else height
    bands = [slice(top, min(top + band, height) + _WINDOW - 1) for top in range(0, height, band)]
    return torch.stack([_band_sum(x[rows], y[rows]) for rows in bands]).sum() / (height * width)


def _band_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the similarities of the windows of a band. All sums over a window are integers below 2³¹, exact."""
    x, y = x.to(torch.int32), y.to(torch.int32)
    count = _WINDOW**2
    sum_x, sum_y = _window_sums(x), _window_sums(y)
    products = sum_x * sum_y
    squares = sum_x * sum_x + sum_y * sum_y
    covariance = count * _window_sums(x * y) - products  # count · (count - 1) times the sample covariance
    variances = count * _window_sums(x * x + y * y) - squares
    c1, c2 = count**2 * _C1, count * (count - 1) * _C2
    similarity = (2 * products.double() + c1) * (2 * covariance.double() + c2)
    return similarity.div_((squares.double() + c1) * (variances.double() + c2)).sum()


def _window_sums(x: Tensor) -> Tensor:
    """Sums of the windows of (H, W) that lie in it: (H - 6, W - 6)."""
    for axis in (0, 1):
        size = x.shape[axis] - _WINDOW + 1
        pairs = x.narrow(axis, 0, size + 5) + x.narrow(axis, 1, size + 5)
        fours = pairs.narrow(axis, 0, size + 3) + pairs.narrow(axis, 2, size + 3)
        x = fours.narrow(axis, 0, size) + pairs.narrow(axis, 4, size) + x.narrow(axis, 6, size)
    return x


def _same_shape(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != target.shape:
        raise ValueError(f"image {tuple(image.shape)} and target {tuple(target.shape)} differ in shape")
    return image, target
