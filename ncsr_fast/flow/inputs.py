"""Checks and padding of the arguments of a conditioned flow, and cropping and clipping of its results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.checks import bytes_range, check_finite, check_image, check_latents, check_like, check_noise, check_pair
from ncsr_fast.config import FlowConfig


class Inputs:
    """Checks, padding and cropping of the images, noise and latents of a flow.

    Args:
        flow: The flow.
        like: A parameter with the dtype and device that tensors must have.
    """

    def __init__(self, flow: FlowConfig, like: Tensor) -> None:
        self.flow, self.like = flow, like

    def lr(self, lr: Tensor) -> Tensor:
        """The LR images, checked and padded to sides that are multiples of `FlowConfig.lr_multiple`."""
        check_image("lr", lr, self.like, self.flow.lr_channels)
        return pad(lr, 1, self.flow.lr_multiple)

    def hr(self, hr: Tensor, lr: Tensor) -> Tensor:
        """The HR images of `lr`, checked and padded like `lr`."""
        check_image("hr", hr, self.like, self.flow.channels)
        check_pair(hr, lr, self.flow.scale)
        return pad(hr, self.flow.scale, self.flow.lr_multiple)

    def noise(self, noise: Tensor | None, lr: Tensor) -> Tensor | None:
        """The noise condition for LR images, checked and padded like `lr`."""
        if noise is None:
            return None
        check_noise(noise, lr, self.flow.scale, self.flow.noise_channels)
        check_like("noise", noise, self.like)
        check_finite("noise", noise)
        return noise if self.flow.noise_channels == 1 else pad(noise, self.flow.scale, self.flow.lr_multiple)

    def latents(self, latents: Sequence[Tensor], lr: Tensor) -> Sequence[Tensor]:
        """The latents, checked, for images of the size of `lr`; for one LR image any number of samples."""
        batch = lr.shape[0]  # torch.export would take len(lr) for a constant
        if batch == 1 and len(latents) and isinstance(latents[0], Tensor) and latents[0].dim() == 4:
            batch = latents[0].shape[0]
        check_latents(latents, [(batch, *shape) for shape in self.flow.latent_shapes(*lr.shape[2:])], self.like)
        return latents

    def sample_latents(self, latents: Sequence[Tensor], lr: Tensor, n: int) -> Sequence[Tensor]:
        """The latents (B, n, …), checked, of n samples of each LR image."""
        shapes = [(lr.shape[0], n, *shape) for shape in self.flow.latent_shapes(*lr.shape[2:])]
        check_latents(latents, shapes, self.like)
        return latents

    def cropped(self, image: Tensor, lr: Tensor) -> Tensor:
        """Images (…, channels, h, w) of the padded size without the padding."""
        return image[..., : lr.shape[2] * self.flow.scale, : lr.shape[3] * self.flow.scale]

    def composed(self, image: Tensor, lr: Tensor) -> Tensor:
        """Decoded images (B, …, channels, h, w) cropped and added to the base that `lr` is enlarged to, not clipped."""
        image, base = self.cropped(image, lr), enlarged(lr, self.flow)
        return image if base is None else image + base.view(lr.shape[0], *[1] * (image.dim() - 4), *base.shape[1:])

    def shown(self, image: Tensor, lr: Tensor) -> Tensor:
        """Decoded images (B, …, channels, h, w) as samples of `lr`: cropped, added to the base, clipped where finite."""
        image = self.composed(image, lr)
        return torch.where(image.isfinite(), image.clamp(0, 1), torch.nan)  # clamp alone would turn infinity into white

    def padded_pixels(self, lr: Tensor) -> int:
        """The number of pixels of a padded HR image."""
        multiple, scale = self.flow.lr_multiple, self.flow.scale
        height, width = (-(-side // multiple) * multiple * scale for side in lr.shape[2:])
        return height * width

    def advice(self, lr: Tensor) -> str:
        """An explanation why samples of LR images blew up, from their pixels, with advice."""
        if not lr.isfinite().all():
            return "Some pixels of lr are not finite."
        values = bytes_range(lr)
        if values:
            return f"lr has values {values}; images are floats in [0, 1]: divide by 255."
        return (
            "Before this step, decoding divided by a scale near zero: model.check_invertibility(lr) shows where. Try a lower "
            "temperature, or on_nonfinite='retry'."
        )


def enlarged(lr: Tensor, flow: FlowConfig) -> Tensor | None:
    """The base of a flow of residuals (B, channels, sH, sW): LR images enlarged; None of a flow of images."""
    if flow.base is None:
        return None
    return F.interpolate(lr, scale_factor=flow.scale, mode=flow.base, align_corners=False)


def pad(image: Tensor, cell: int, multiple: int = 2) -> Tensor:
    """The image (B, C, H, W) padded at the bottom and right to multiples of `multiple` cells; itself if no padding is needed.

    Padding is by reflection, or by replication along an axis that is too short to reflect.

    Args:
        image: The image to pad.
        cell: Pixels of `image` per LR pixel along an axis: 1 for the LR image, `scale` for the HR image and its noise.
        multiple: Number of LR pixels that the padded sides are multiples of.
    """
    for axis in (-1, -2):
        size = image.shape[axis]
        missing = -size % (multiple * cell)
        if missing:
            sides = (0, missing, 0, 0) if axis == -1 else (0, 0, 0, missing)
            image = F.pad(image, sides, mode="reflect" if size > missing else "replicate")
    return image
