"""LLFlow's encoder of low-light images (Wang et al. 2022), which makes the mean of the flow's prior as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.checkpoints.state_dicts import Entry
from ncsr_fast.encoder.blocks import ENGINE, SLOPE, ResidualBlock, conv3x3, convolved, trunk
from ncsr_fast.encoder.names import encoder_layout
from ncsr_fast.engine.condition import Condition, Features
from ncsr_fast.ops.conv3x3 import ConvolutionMethod

_SQUEEZE = 8  # of the prior's mean, at once: another order of channels than that of three squeezes by 2
_DARKEST = 1e-4  # added to the sum of an image's channels, which the colour map divides by


class LowLightEncoder(nn.Module):
    """The encoder of LLFlow (`ConEncoder1`), which reads six channels: `ncsr_fast.data.low_light_input`.

    The features of the three levels have H/2, H/4 and H/8, and the prior of the top latent is N(mean, 1), where the mean is a
    map of the scene's colours, squeezed.

    Args:
        channels: Width of the features.
        growth: Channels that each convolution of a dense block adds.
        blocks: Number of residual-in-residual dense blocks.
        stacked_blocks: Indices of the blocks whose outputs condition the flow too.
    """

    in_channels = 6

    def __init__(self, channels: int = 64, growth: int = 32, blocks: int = 24, stacked_blocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.channels, self.growth, self.stacked_blocks = channels, growth, tuple(stacked_blocks)
        self.conv_first = conv3x3(2 * self.in_channels, channels)
        self.conv_second = conv3x3(channels, channels)
        self.body = nn.ModuleList(ResidualBlock(channels, growth) for _ in range(blocks))
        self.conv_body = conv3x3(channels, channels)
        self.downconv1, self.downconv2 = conv3x3(channels, channels), conv3x3(channels, channels)
        self.conv_color_map = nn.Conv2d(channels, 3, 1)

    @property
    def condition_channels(self) -> int:
        """Channels of the conditioning features u of every level."""
        return self.channels * (1 + len(self.stacked_blocks))

    def head(self) -> list[nn.Module]:
        """The modules that the flow does not use: none."""
        return []

    def configuration(self) -> dict[str, Any]:
        """The arguments the encoder was built with."""
        return {
            "channels": self.channels,
            "growth": self.growth,
            "blocks": len(self.body),
            "stacked_blocks": list(self.stacked_blocks),
        }

    def describe(self) -> str:
        """The encoder in a few words, for messages."""
        return f"LLFlow's encoder, {len(self.body)} blocks of {self.channels} channels"

    def condition(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> Condition:
        """The condition of a flow's levels: see `ncsr_fast.engine.condition.Encoder`.

        Args:
            lr: (B, 6, H, W), H and W multiples of 8.
            method: As for `ncsr_fast.ops.conv3x3.convolution`.

        Returns:
            Features at H/2, H/4 (after its LeakyReLU, which the published encoder applies in place) and H/8; and the mean of
            the prior, the squeezed `color_map`, (B, 192, H/8, W/8).
        """
        half, stacked = self._trunk(lr, method)
        quarter = F.leaky_relu(convolved(F.avg_pool2d(half, 2), self.downconv1, method), SLOPE)
        eighth = convolved(F.avg_pool2d(quarter, 2), self.downconv2, method)
        features = [Features(own, stacked) for own in (half, quarter, eighth)]
        return Condition(features, squeezed(self._color_map(half, method)))

    def condition_bytes(self, element_size: int, tiled: bool) -> int:
        """Bytes a pixel of the images that `condition` takes, with numbers of so many bytes; it is never in tiles.

        The first convolutions are at full resolution: their outputs, and the pooled one with its indices of 8 bytes. Behind
        them are block outputs, of half the side, with what a block has, as `RRDB.condition_bytes` says.
        """
        stacked = len(self.stacked_blocks)
        first = element_size * self.channels * (2 + 1 / 4) + 8 * self.channels / 4
        within = max(self.channels * (stacked + 6) + 4 * self.growth, self.channels * (2 * stacked + 2))
        return round(max(first, element_size * within / 4))

    def feature_bytes(self, element_size: int, tiled: bool) -> int:
        """Bytes a pixel of the condition itself: stacked block outputs, features of three sizes, and the prior's mean."""
        return round(element_size * (self.channels * ((len(self.stacked_blocks) + 1) / 4 + 1 / 16 + 1 / 64) + 3))

    def color_map(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        """The colours that the encoder expects of the scene, each as its share: (B, 3, H, W). Arguments as for `condition`."""
        return self._color_map(self._trunk(lr, method)[0], method)

    @staticmethod
    def reference_prior_mean(hr: Tensor) -> Tensor:
        """The prior's mean, (B, 192, H/8, W/8), from the colours of the reference image hr (B, 3, H, W). Differentiable."""
        return squeezed(color_shares(hr))

    def layout(self) -> Iterator[Entry]:
        """Every tensor of the encoder in a published file, by its name there and in the order of the file."""
        for entry in encoder_layout(self):
            if entry.name == "conv_color_map.weight":
                for name, shape in self._unused().items():
                    yield Entry(name, shape, None)
            yield entry._replace(name=entry.name.replace("conv_color_map", "fine_tune_color_map.0"))

    def _unused(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in published files that no computation reads."""
        width, shapes = self.channels, {}
        for name, shape in (
            ("downconv3", (width, width, 3, 3)),
            ("HRconv", (width, width, 3, 3)),
            ("conv_last", (3, width, 3, 3)),
            ("awb_para", (3, width)),
        ):
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
        return shapes

    def _trunk(self, lr: Tensor, method: ConvolutionMethod | None) -> tuple[Tensor, Tensor | None]:
        return trunk(partial(self._start, lr, method), self.body, self.conv_body, self.stacked_blocks, "conv_first", method)

    def _start(self, lr: Tensor, method: ConvolutionMethod | None) -> Tensor:
        """What the first block reads, of half the side."""
        first = F.leaky_relu(convolved(encoder_input(lr), self.conv_first, method), SLOPE)
        return F.max_pool2d(convolved(first, self.conv_second, method), 2)

    def _color_map(self, half: Tensor, method: ConvolutionMethod | None) -> Tensor:
        shares = torch.sigmoid(convolved(half, self.conv_color_map, method))
        return F.interpolate(shares, scale_factor=2, mode="nearest")


def encoder_input(lr: Tensor) -> Tensor:
    """The 12 channels that the first convolution reads, of the six of lr (B, 6, H, W), whose first three are logarithms.

    They are those six, the `color_shares` of the image, and their edges: the larger of the slopes along the two axes.
    """
    shares = color_shares(lr[:, :3].exp())
    padded = F.pad(shares, (1, 1, 1, 1))
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    return torch.cat([lr, shares, torch.maximum(down.abs(), across.abs())], dim=1)


def color_shares(image: Tensor) -> Tensor:
    """The share that each channel of an image (B, C, H, W) has in the sum of all, at every pixel."""
    return image / (image.sum(dim=1, keepdim=True) + _DARKEST)


def squeezed(color_map: Tensor) -> Tensor:
    """The mean of the prior, (B, 192, H/8, W/8), that a colour map (B, 3, H, W) is."""
    return F.pixel_unshuffle(color_map, _SQUEEZE)
