"""The RRDB generator (ESRGAN, Wang et al. 2018): a super-resolution network, and the encoder of the flow."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast import files
from ncsr_fast.engine.convolution import ConvolutionMethod, convolution
from ncsr_fast.engine.dense_block import dense_block
from ncsr_fast.hub import find_model
from ncsr_fast.nn import published

SLOPE = 0.2  # of every LeakyReLU
ENGINE = ConvolutionMethod()
RESIDUAL = 0.2  # weight of a dense block's, and of a block's, residual branch


def conv3x3(inputs: int, outputs: int, scale: float | None = None) -> nn.Conv2d:
    """A 3×3 convolution; with `scale`, initialised as ESRGAN's residual blocks are (Kaiming normal × scale)."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    if scale is not None:
        nn.init.kaiming_normal_(conv.weight, a=0, mode="fan_in")
        conv.weight.data.mul_(scale)
        nn.init.zeros_(conv.bias)
    return conv


class DenseBlock(nn.Module):
    """Five convolutions, each reading everything before it; `x + 0.2 · conv5(...)`."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for index in range(1, 5):
            setattr(self, f"conv{index}", conv3x3(channels + (index - 1) * growth, growth, scale=0.1))
        self.conv5 = conv3x3(channels + 4 * growth, channels, scale=0.1)

    def forward(self, x: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        convolutions = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        return dense_block(x, [(conv.weight, conv.bias) for conv in convolutions], SLOPE, RESIDUAL, method)


class ResidualBlock(nn.Module):
    """Residual-in-residual dense block: three dense blocks in a residual of their own."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        y = x
        for dense in (self.rdb1, self.rdb2, self.rdb3):
            y = dense(y, method)
        return torch.add(x, y, alpha=RESIDUAL)


class RRDB(nn.Module):
    """Deterministic ×`scale` generator whose inner features condition the flow.

    `forward(lr)` is the super-resolved image (B, 3, sH, sW), what an L1 pre-training optimises.
    `features(lr)` are the conditioning features of the flow's levels, from the HR side, without the
    HR part of the network, which they do not need.

    scale           a power of two
    channels, growth, blocks   width, growth of the dense blocks, number of blocks
    stacked_blocks  indices of the blocks whose outputs `features` appends; none for a generator alone
    """

    def __init__(
        self, scale: int = 4, channels: int = 64, growth: int = 32, blocks: int = 23, stacked_blocks: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two, not {scale!r}")
        self.scale, self.channels, self.growth, self.stacked_blocks = scale, channels, growth, tuple(stacked_blocks)
        self.conv_first = conv3x3(3, channels)
        self.body = nn.ModuleList(ResidualBlock(channels, growth) for _ in range(blocks))
        self.conv_body = conv3x3(channels, channels)
        self.conv_up = nn.ModuleList(conv3x3(channels, channels) for _ in range(int(math.log2(scale))))
        self.conv_hr = conv3x3(channels, channels)
        self.conv_last = conv3x3(channels, 3)

    def head(self) -> list[nn.Module]:
        """The modules that only the super-resolved image uses: the last upsampling and what follows."""
        return [self.conv_up[-1], self.conv_hr, self.conv_last]

    # -- weights ---------------------------------------------------------------------------------------------

    def load_published(self, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load published RRDB or ESRGAN weights: a state dict or a file, in SRFlow's, BasicSR's or ESRGAN's naming.

        The `RRDB.` part of a flow checkpoint will do as well. Strict: raises CheckpointError naming what does not fit,
        and then changes nothing.
        """
        published.load_encoder(self, published.read_encoder_state_dict(source))

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under SRFlow's (and ESRGAN's new) names."""
        return {name: tensor.clone() for name, tensor in published.encoder_layout(self)}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> RRDB:
        """A generator from a directory written by `save_pretrained`, a published file, or the Hugging Face Hub.

        path     a directory; a .pth or .safetensors, whose shapes tell its size; or a repository "user/name" of the Hub
        others   and what is raised: as `NCSR.from_pretrained`
        """
        path = find_model(path, revision, cache_dir, token, local_files_only)
        if path.is_dir():
            return files.load_directory(path, "rrdb", lambda values: cls(**values))
        return cls.from_state_dict(published.read_encoder_state_dict(path))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> RRDB:
        """A generator of the size that the shapes tell, from a state dict under SRFlow's names."""
        encoder = cls(**published.encoder_configuration(state))
        files.adopt_dtype(encoder, state)
        published.load_encoder(encoder, state)
        return encoder

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, each atomically; return it."""
        return files.save_directory(self, "rrdb", self.configuration(), directory)

    def configuration(self) -> dict[str, Any]:
        """The arguments it was built with."""
        shape = {"scale": self.scale, "channels": self.channels, "growth": self.growth, "blocks": len(self.body)}
        return {**shape, "stacked_blocks": list(self.stacked_blocks)}

    def describe(self) -> str:
        """The generator in a few words, for messages."""
        return f"RRDB, ×{self.scale}, {len(self.body)} blocks of {self.channels} channels"

    # -- images and features ---------------------------------------------------------------------------------

    def forward(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        fea, _ = self._trunk(lr, method)
        for conv in self.conv_up:
            fea = self._upsample(fea, conv, method)
        return self._conv(F.leaky_relu(self._conv(fea, self.conv_hr, method), SLOPE), self.conv_last, method)

    def features(self, lr: Tensor) -> list[Tensor]:
        """Conditioning features u of the levels, from the HR side.

        Level ℓ (from 1) gets (B, channels · (1 + stacked blocks), s·H/2^ℓ, s·W/2^ℓ): the features of that
        resolution, then the stacked block outputs resized to it by nearest neighbour. H and W must be even. This is
        the definition, without the engine, as `pyramid` with `method=None` is.
        """
        pyramid, stacked = self.pyramid(lr, method=None)
        if stacked is None:
            return pyramid
        return [torch.cat([own, F.interpolate(stacked, size=own.shape[2:], mode="nearest")], dim=1) for own in pyramid]

    def pyramid(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> tuple[list[Tensor], Tensor | None]:
        """The features of each level's own resolution, from the HR side, and the stacked block outputs at LR resolution.

        At LR size the former are the trunk's output, above it they are *after* the LeakyReLU (the published encoder
        applies it in place), and at half the LR size they are its 2×2 averages. In the dtype and layout of lr.
        `method` as for `ncsr_fast.engine.convolution.convolution`.
        """
        trunk, stacked = self._trunk(lr, method)
        pyramid = [F.avg_pool2d(trunk, 2), trunk]
        for conv in self.conv_up[:-1]:
            pyramid.append(self._upsample(pyramid[-1], conv, method))
        return pyramid[::-1], stacked

    def _trunk(self, lr: Tensor, method: ConvolutionMethod | None) -> tuple[Tensor, Tensor | None]:
        fea = self._conv(lr, self.conv_first, method)
        outputs = {}
        for index, block in enumerate(self.body):
            fea = block(fea, method)
            if index in self.stacked_blocks:
                outputs[index] = fea
        stacked = torch.cat([outputs[index] for index in self.stacked_blocks], dim=1) if outputs else None
        return fea + self._conv(fea, self.conv_body, method), stacked

    @staticmethod
    def _conv(x: Tensor, conv: nn.Conv2d, method: ConvolutionMethod | None) -> Tensor:
        return convolution(x, conv.weight, conv.bias, method)

    @classmethod
    def _upsample(cls, fea: Tensor, conv: nn.Conv2d, method: ConvolutionMethod | None) -> Tensor:
        return F.leaky_relu(cls._conv(F.interpolate(fea, scale_factor=2, mode="nearest"), conv, method), SLOPE)
