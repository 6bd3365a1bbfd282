"""The condition of a flow: the encoder's features of every level, and the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.ops.conv3x3 import ConvolutionMethod


class Features(NamedTuple):
    """The condition u of a level: its own features, and stacked features at LR resolution, resized by nearest neighbour.

    Args:
        own: (B, c, h, w), at the level's resolution.
        stacked: (B, s, h', w') with h = f·h' or h'/f for an integer f; or None.
    """

    own: Tensor
    stacked: Tensor | None = None

    @property
    def joined(self) -> Tensor:
        """u as one tensor (B, c + s, h, w)."""
        if self.stacked is None:
            return self.own
        return torch.cat([self.own, F.interpolate(self.stacked, size=self.own.shape[2:], mode="nearest")], dim=1)

    @property
    def upsampled(self) -> bool:
        """True if the level is larger than LR, so that its stacked features are upsampled."""
        return self.stacked is not None and self.own.shape[2] > self.stacked.shape[2]

    def sample(self, index: int) -> Features:
        """The features of one image of the batch, with a batch dimension of 1."""
        image = slice(index, index + 1)
        return Features(self.own[image], None if self.stacked is None else self.stacked[image])


class Condition(NamedTuple):
    """The condition that an encoder makes of an LR image.

    Args:
        features: The features of every level, from the HR side.
        prior_mean: Mean of the prior of the top latent, of its shape; None is zero.
    """

    features: Sequence[Features]
    prior_mean: Tensor | None = None

    def sample(self, index: int) -> Condition:
        """The condition of one image of the batch, with a batch dimension of 1."""
        mean = None if self.prior_mean is None else self.prior_mean[index : index + 1]
        return Condition([features.sample(index) for features in self.features], mean)


class Encoder(Protocol):
    """Interface of a module that makes a `Condition` of LR images."""

    def condition(self, lr: Tensor, method: ConvolutionMethod | None) -> Condition:
        """The condition of LR images (B, 3, H, W) with even sides.

        Args:
            lr: The LR images, in the dtype and layout that the features should have.
            method: How `ncsr_fast.ops.conv3x3.convolution` convolves; None asks for the reference, PyTorch's convolutions in
                true float32.
        """
        ...


def resized_noise(noise: Tensor, size: torch.Size) -> Tensor:
    """The noise condition v at a level's resolution: bicubic, half-pixel centres, no antialiasing; a number is expanded."""
    if noise.shape[2:] == (1, 1):
        return noise.expand(-1, -1, *size)
    return F.interpolate(noise, size=size, mode="bicubic", align_corners=False)
