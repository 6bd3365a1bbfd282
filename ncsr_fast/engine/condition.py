"""The condition of a flow: the encoder's features of every level, and the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.ops.conv3x3 import ConvolutionMethod


class Features(NamedTuple):
    """The condition u of a level: its own features, and features of LR resolution, resized to it by nearest neighbour.

    Args:
        own: (B, c, h, w), at the level's resolution.
        stacked: (B, s, h', w'), h being f·h' or h'/f for an integer f; or None.
    """

    own: Tensor
    stacked: Tensor | None = None

    @property
    def joined(self) -> Tensor:
        """u as one tensor (B, c + s, h, w)."""
        if self.stacked is None:
            return self.own
        return torch.cat([self.own, resized(self.stacked, self.own)], dim=1)

    @property
    def upsampled(self) -> bool:
        """True for a level larger than LR, whose stacked features are upsampled."""
        return self.stacked is not None and self.own.shape[2] > self.stacked.shape[2]

    def sample(self, index: int) -> Features:
        """The features of one image of the batch, which keeps its dimension."""
        image = slice(index, index + 1)
        return Features(self.own[image], None if self.stacked is None else self.stacked[image])


class Condition(NamedTuple):
    """The condition that an encoder makes of an LR image.

    Args:
        features: Of every level, from the HR side.
        prior_mean: Mean of the prior of the top latent, of its shape; None is zero.
    """

    features: Sequence[Features]
    prior_mean: Tensor | None = None

    def sample(self, index: int) -> Condition:
        """The condition of one image of the batch, which keeps its dimension."""
        mean = None if self.prior_mean is None else self.prior_mean[index : index + 1]
        return Condition([features.sample(index) for features in self.features], mean)


class Encoder(Protocol):
    """A module that makes a `Condition` of LR images."""

    def condition(self, lr: Tensor, method: ConvolutionMethod | None) -> Condition:
        """The condition of LR images (B, 3, H, W) of even sides.

        Args:
            lr: In the dtype and layout that features are wanted in.
            method: How to convolve, for `ncsr_fast.ops.conv3x3.convolution`; None asks for the reference, PyTorch's
                convolutions in true float32.
        """
        ...


def resized(stacked: Tensor, own: Tensor) -> Tensor:
    """The stacked features at the resolution of a level's own: by nearest neighbour."""
    if stacked.shape[2:] == own.shape[2:]:
        return stacked
    return F.interpolate(stacked, size=own.shape[2:], mode="nearest")


def resized_noise(noise: Tensor, size: torch.Size) -> Tensor:
    """The noise condition v at the resolution of a level: bicubic, half-pixel centres, no antialiasing; a number is spread."""
    if noise.shape[2:] == (1, 1):
        return noise.expand(-1, -1, *size)
    return F.interpolate(noise, size=size, mode="bicubic", align_corners=False)
