"""The condition of a flow: the encoder's features of every level, and the noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

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
    def batch(self) -> int:
        """The number of images."""
        return self.own.shape[0]

    @property
    def size(self) -> torch.Size:
        """(h, w) of the level."""
        return self.own.shape[2:]

    @property
    def multiple(self) -> int:
        """Of which the borders of a `region` must be multiples: f where the stacked features are upsampled, else 1."""
        return self.own.shape[2] // self.stacked.shape[2] if self.stacked is not None and self.upsampled else 1

    @property
    def whole(self) -> Features:
        """The features themselves; of those of a level that are made where they are wanted, all of them."""
        return self

    def region(self, rows: slice, columns: slice) -> Features:
        """The features of some rows and columns of the level."""
        return Features(self.own[..., rows, columns], stacked_region(self.stacked, self.size, rows, columns))

    @property
    def joined(self) -> Tensor:
        """u as one tensor (B, c + s, h, w)."""
        if self.stacked is None:
            return self.own
        return torch.cat([self.own, resized(self.stacked, self.own)], dim=1)

    @property
    def upsampled(self) -> bool:
        """True if the level is larger than LR, so that its stacked features are upsampled."""
        return self.stacked is not None and self.own.shape[2] > self.stacked.shape[2]

    def sample(self, index: int) -> Features:
        """The features of one image of the batch, with a batch dimension of 1."""
        image = slice(index, index + 1)
        return Features(self.own[image], None if self.stacked is None else self.stacked[image])


def stacked_region(stacked: Tensor | None, size: Sequence[int], rows: slice, columns: slice) -> Tensor | None:
    """The part of stacked features that belongs to some rows and columns of a level of a size (h, w)."""
    if stacked is None:
        return None
    edges = [
        slice(edge.start * below // own, edge.stop * below // own)
        for edge, below, own in zip((rows, columns), stacked.shape[2:], size)
    ]
    return stacked[..., edges[0], edges[1]]


class LevelFeatures(Protocol):
    """The features of a level, which are there, or made where they are wanted; a tuple of tensors and other things."""

    def __iter__(self) -> Iterator[Any]: ...

    @property
    def batch(self) -> int: ...

    @property
    def size(self) -> torch.Size: ...

    @property
    def multiple(self) -> int: ...

    @property
    def whole(self) -> Features: ...

    def region(self, rows: slice, columns: slice) -> Features: ...

    def sample(self, index: int) -> LevelFeatures: ...


class Condition(NamedTuple):
    """The condition that an encoder makes of an LR image.

    Args:
        features: The features of every level, from the HR side.
        prior_mean: Mean of the prior of the top latent, of its shape; None is zero.
    """

    features: Sequence[LevelFeatures]
    prior_mean: Tensor | None = None

    def with_mean_in(self, dtype: torch.dtype) -> Condition:
        """The condition with the prior's mean in the dtype of the state."""
        return self if self.prior_mean is None else self._replace(prior_mean=self.prior_mean.to(dtype))

    def sample(self, index: int) -> Condition:
        """The condition of one image of the batch, with a batch dimension of 1."""
        mean = None if self.prior_mean is None else self.prior_mean[index : index + 1]
        return Condition([features.sample(index) for features in self.features], mean)


class Encoder(Protocol):
    """A module that makes a `Condition` of LR images.

    One whose prior's mean may come from the HR images as well has a method `reference_prior_mean(hr)`, for
    `model.nll(hr, lr, prior="reference")`.
    """

    def condition(self, lr: Tensor, method: ConvolutionMethod | None) -> Condition:
        """The condition of LR images (B, lr_channels, H, W), their sides multiples of `FlowConfig.lr_multiple`.

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
    """The noise condition v at a level's resolution: bicubic, half-pixel centres, no antialiasing; a number is expanded."""
    if noise.shape[2:] == (1, 1):
        return noise.expand(-1, -1, *size)
    return F.interpolate(noise, size=size, mode="bicubic", align_corners=False)
