"""The RRDB network: ESRGAN's generator (Wang et al. 2018) and its relatives, and the encoder of the flow."""

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
from ncsr_fast.checks import check_like
from ncsr_fast.encoder import checkpoints
from ncsr_fast.encoder.names import published_layout
from ncsr_fast.engine.condition import Condition, Features
from ncsr_fast.engine.dense_block import dense_block
from ncsr_fast.hub import find_model
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution

SLOPE = 0.2  # slope of every LeakyReLU
ENGINE = ConvolutionMethod()
RESIDUAL = 0.2  # weight of a dense block's, and of a block's, residual branch
NOISE = 0.1  # standard deviation of nESRGAN+'s noise, relative to the features it multiplies
LONG_SKIPS = ("conv_first", "last_block")
TRAINING_NOISE = ("none", "dense", "all")


def conv3x3(inputs: int, outputs: int, scale: float | None = None) -> nn.Conv2d:
    """A 3×3 convolution; with `scale`, initialised as ESRGAN's residual blocks are (Kaiming normal × scale)."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    if scale is not None:
        nn.init.kaiming_normal_(conv.weight, a=0, mode="fan_in")
        conv.weight.data.mul_(scale)
        nn.init.zeros_(conv.bias)
    return conv


class ResidualNoise(nn.Module):
    """Gaussian noise proportional to the features, y · (1 + 0.1 · n), applied in training mode if it is `active`.

    The attribute `draw` is a function that draws the standard normal numbers n for y. By default it uses PyTorch's global
    generator, as dropout does; another function may be assigned, to supply the noise or a generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.draw = torch.randn_like

    def forward(self, y: Tensor) -> Tensor:
        """y with noise if active and in training mode, else y."""
        return y * (1 + NOISE * self.draw(y)) if self.active and self.training else y


class DenseBlock(nn.Module):
    """Five convolutions, each of which reads the input and all outputs before it; `x + 0.2 · conv5(...)`.

    Args:
        channels: Channels of x.
        growth: Channels that each of the first four convolutions adds.
        residual: True: ESRGAN+'s block (Rakotonirina and Rasoanaivo 2020). A 1×1 convolution of x is added to the output of
            conv2, and the sum to the output of conv4.
    """

    def __init__(self, channels: int, growth: int, residual: bool = False) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(channels, growth, 1, bias=False) if residual else None
        for index in range(1, 5):
            setattr(self, f"conv{index}", conv3x3(channels + (index - 1) * growth, growth, scale=0.1))
        self.conv5 = conv3x3(channels + 4 * growth, channels, scale=0.1)
        self.noise = ResidualNoise()

    def forward(self, x: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        """The block's output, of the shape of x."""
        if self.conv1x1 is not None:
            return self.noise(self._with_residuals(x, method))
        convolutions = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        y = dense_block(x, [(conv.weight, conv.bias) for conv in convolutions], SLOPE, RESIDUAL, method)
        return self.noise(y)

    def _with_residuals(self, x: Tensor, method: ConvolutionMethod | None) -> Tensor:
        def convolved(conv: nn.Conv2d, *features: Tensor) -> Tensor:
            return convolution(torch.cat(features, dim=1), conv.weight, conv.bias, method)

        x1 = F.leaky_relu(convolved(self.conv1, x), SLOPE)
        x2 = F.leaky_relu(convolved(self.conv2, x, x1), SLOPE) + convolved(self.conv1x1, x)
        x3 = F.leaky_relu(convolved(self.conv3, x, x1, x2), SLOPE)
        x4 = F.leaky_relu(convolved(self.conv4, x, x1, x2, x3), SLOPE) + x2
        return torch.add(x, convolved(self.conv5, x, x1, x2, x3, x4), alpha=RESIDUAL)


class ResidualBlock(nn.Module):
    """Residual-in-residual dense block: three dense blocks in a residual of their own."""

    def __init__(self, channels: int, growth: int, dense_residual: bool = False) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth, dense_residual) for _ in range(3))
        self.noise = ResidualNoise()

    def forward(self, x: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        """The block's output, of the shape of x."""
        y = x
        for dense in (self.rdb1, self.rdb2, self.rdb3):
            y = dense(y, method)
        return self.noise(torch.add(x, y, alpha=RESIDUAL))


class RRDB(nn.Module):
    """ESRGAN's ×`scale` generator, or the encoder of the flow, which is the same network except for its long skip.

    `forward(lr)` is the super-resolved image. `features(lr)` are the features that condition the flow's levels, from the HR
    side; they do not need the HR part of the network.

    Args:
        scale: A power of two.
        channels: Width of the features.
        growth: Channels that each convolution of a dense block adds.
        blocks: Number of residual-in-residual dense blocks.
        stacked_blocks: Indices of the blocks whose outputs `features` appends; none for a generator.
        long_skip: The tensor that is added to the convolution after the blocks. "conv_first": the output of the first
            convolution, as in ESRGAN, BasicSR, Real-ESRGAN and ESRGAN+. "last_block": the output of the last block, as in the
            encoders of SRFlow and NCSR.
        unshuffle: Side of the blocks of pixels that become channels before the first convolution, a power of two: 2 in
            BasicSR's ×2 generators, 4 in its ×1 generators. The sides of the image must be multiples of it.
        in_channels: Channels of the input image, before the pixel unshuffle.
        out_channels: Channels of the returned image.
        dense_residual: Use ESRGAN+'s dense blocks, which contain residuals.
        training_noise: Where features are multiplied by Gaussian noise in training mode: "none"; "dense", after each dense
            block, as nESRGAN+ is trained; "all", also after each block. It can be changed later: `generator.training_noise =
            "none"`.
    """

    def __init__(
        self,
        scale: int = 4,
        channels: int = 64,
        growth: int = 32,
        blocks: int = 23,
        stacked_blocks: tuple[int, ...] = (),
        *,
        long_skip: str = "conv_first",
        unshuffle: int = 1,
        in_channels: int = 3,
        out_channels: int = 3,
        dense_residual: bool = False,
        training_noise: str = "none",
    ) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("unshuffle", unshuffle)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value!r}")
        if long_skip not in LONG_SKIPS:
            raise ValueError(f"long_skip must be one of {', '.join(map(repr, LONG_SKIPS))}, not {long_skip!r}")
        self.scale, self.channels, self.growth, self.stacked_blocks = scale, channels, growth, tuple(stacked_blocks)
        self.long_skip, self.unshuffle, self.dense_residual = long_skip, unshuffle, dense_residual
        self.in_channels, self.out_channels = in_channels, out_channels
        self.conv_first = conv3x3(in_channels * unshuffle**2, channels)
        self.body = nn.ModuleList(ResidualBlock(channels, growth, dense_residual) for _ in range(blocks))
        self.conv_body = conv3x3(channels, channels)
        self.conv_up = nn.ModuleList(conv3x3(channels, channels) for _ in range(int(math.log2(scale * unshuffle))))
        self.conv_hr = conv3x3(channels, channels)
        self.conv_last = conv3x3(channels, out_channels)
        self.training_noise = training_noise

    @property
    def training_noise(self) -> str:
        """Where features are multiplied by noise in training mode: "none", "dense" or "all"."""
        return self._training_noise

    @training_noise.setter
    def training_noise(self, value: str) -> None:
        if value not in TRAINING_NOISE:
            raise ValueError(f"training_noise must be one of {', '.join(map(repr, TRAINING_NOISE))}, not {value!r}")
        self._training_noise = value
        for block in self.body:
            block.noise.active = value == "all"
            for dense in (block.rdb1, block.rdb2, block.rdb3):
                dense.noise.active = value != "none"

    def head(self) -> list[nn.Module]:
        """The modules that only the super-resolved image uses: the last upsampling and the layers after it."""
        return [*self.conv_up[-1:], self.conv_hr, self.conv_last]

    def configuration(self) -> dict[str, Any]:
        """The arguments that the network was built with."""
        return {
            "scale": self.scale,
            "channels": self.channels,
            "growth": self.growth,
            "blocks": len(self.body),
            "stacked_blocks": list(self.stacked_blocks),
            "long_skip": self.long_skip,
            "unshuffle": self.unshuffle,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "dense_residual": self.dense_residual,
            "training_noise": self.training_noise,
        }

    def describe(self) -> str:
        """A description of the network in a few words, for messages."""
        kind = "RRDB with ESRGAN+'s residuals" if self.dense_residual else "RRDB"
        images = f" of {self.in_channels}-channel images" if self.in_channels != 3 else ""
        unshuffled = f", pixel unshuffle {self.unshuffle}" if self.unshuffle > 1 else ""
        return f"{kind}, ×{self.scale}{images}, {len(self.body)} blocks of {self.channels} channels{unshuffled}"

    def forward(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        """The super-resolved image of lr.

        Args:
            lr: (B, in_channels, H, W), in [0, 1], of the dtype and device of the weights. H and W must be multiples of
                `unshuffle`; like the published programs, this method does not pad.
            method: How `ncsr_fast.ops.conv3x3.convolution` convolves.

        Returns:
            (B, out_channels, scale·H, scale·W), not clipped.

        Raises:
            ValueError: The shape of lr is not as above.
            TypeError: lr is not a tensor of floats.
        """
        self._check(lr)
        fea, _ = self._trunk(lr, method)
        for conv in self.conv_up:
            fea = self._upsample(fea, conv, method)
        return self._conv(F.leaky_relu(self._conv(fea, self.conv_hr, method), SLOPE), self.conv_last, method)

    def features(self, lr: Tensor) -> list[Tensor]:
        """The features u that condition the flow's levels, from the HR side.

        Level ℓ (from 1) gets (B, channels · (1 + stacked blocks), s·H/2^ℓ, s·W/2^ℓ): its own features, then the stacked
        features, resized to the level by nearest neighbour. H and W must be even. This method is the reference, without the
        engine, as is `pyramid` with `method=None`.
        """
        pyramid, stacked = self.pyramid(lr, method=None)
        if stacked is None:
            return pyramid
        return [torch.cat([own, F.interpolate(stacked, size=own.shape[2:], mode="nearest")], dim=1) for own in pyramid]

    def pyramid(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> tuple[list[Tensor], Tensor | None]:
        """The own features of each level, from the HR side, and the stacked block outputs at LR resolution.

        The own features at LR size are the trunk's output. Above LR size they are taken *after* the LeakyReLU, because the
        published encoder applies it in place; at half the LR size they are 2×2 averages of the trunk's output. All features
        have the dtype and layout of lr. `method` says how `ncsr_fast.ops.conv3x3.convolution` convolves.
        """
        trunk, stacked = self._trunk(lr, method)
        pyramid = [F.avg_pool2d(trunk, 2), trunk]
        for conv in self.conv_up[:-1]:
            pyramid.append(self._upsample(pyramid[-1], conv, method))
        return pyramid[::-1], stacked

    def condition(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> Condition:
        """The condition of a flow's levels for LR images with even sides: see `ncsr_fast.engine.condition.Encoder`."""
        pyramid, stacked = self.pyramid(lr, method)
        return Condition([Features(own, stacked) for own in pyramid])

    def load_published(self, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load the weights of a published generator, or of the encoder in a flow checkpoint, into this network.

        If the tensors do not fit, nothing is changed. The network's own long skip is not changed: a flow's encoder may start
        from an ESRGAN generator, to be trained further.

        Args:
            source: A state dict or a file, in the names of SRFlow, BasicSR or ESRGAN (new and old).

        Raises:
            CheckpointError: Tensors are missing, unexpected or of the wrong shape; or the weights are of a flow's encoder,
                whose long skip starts at the last block, and this network's long skip does not.
        """
        checkpoints.load_published(self, source)

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names that the published programs read.

        These are SRFlow's names, which NCSR and ESRGAN's new architecture share. ESRGAN+ has its own names, and generators that
        begin with a pixel unshuffle have BasicSR's names.
        """
        return {name: tensor.clone() for name, tensor in published_layout(self)}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        long_skip: str | None = None,
        unshuffle: int | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> RRDB:
        """A generator from a directory written by `save_pretrained`, a published file, or the Hugging Face Hub.

        Published files are those of ESRGAN (new and old architecture), of BasicSR and Real-ESRGAN with their ×2 and ×1 forms,
        of ESRGAN+, and of the encoders of SRFlow and NCSR. The sizes of the network follow from the shapes.

        Args:
            path: A directory; a .pth or .safetensors file; or a repository "user/name" of the Hub.
            long_skip: Where the long skip starts, which no file of weights records: "conv_first", the default, for all
                generators; "last_block" for the RRDB files of SRFlow and NCSR. A flow checkpoint always has "last_block". A
                directory has what its config.json says, or "last_block" if an earlier version wrote config.json without it.
            unshuffle: Side of the pixel unshuffle before the first convolution, which no file records. None: the shapes decide.
                It is then 2, 4, … if the first convolution reads 4, 16, … times the channels that the last one makes, as in
                BasicSR's ×2 and ×1 generators, and the network upsamples often enough; otherwise it is 1.
            revision: Revision of the Hub repository, as in `huggingface_hub.snapshot_download`.
            cache_dir: As in `huggingface_hub.snapshot_download`.
            token: As in `huggingface_hub.snapshot_download`.
            local_files_only: As in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: long_skip or unshuffle contradicts the flow or the directory.
            FileNotFoundError, CheckpointError, ImportError: As for `NCSR.from_pretrained`.
        """
        path = find_model(path, revision, cache_dir, token, local_files_only)
        return checkpoints.from_pretrained(cls, path, long_skip, unshuffle)

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, each atomically, and return it."""
        return files.save_directory(self, "rrdb", self.configuration(), directory)

    def _trunk(self, lr: Tensor, method: ConvolutionMethod | None) -> tuple[Tensor, Tensor | None]:
        x = F.pixel_unshuffle(lr, self.unshuffle) if self.unshuffle > 1 else lr
        first = fea = self._conv(x, self.conv_first, method)
        outputs = {}
        for index, block in enumerate(self.body):
            fea = block(fea, method)
            if index in self.stacked_blocks:
                outputs[index] = fea
        stacked = torch.cat([outputs[index] for index in self.stacked_blocks], dim=1) if outputs else None
        skip = first if self.long_skip == "conv_first" else fea
        return skip + self._conv(fea, self.conv_body, method), stacked

    def _check(self, lr: Tensor) -> None:
        if not isinstance(lr, Tensor):
            raise TypeError(f"lr must be a tensor, not {type(lr).__name__}")
        if not lr.is_floating_point():
            check_like("lr", lr, self.conv_first.weight)  # other floats may be autocast's
        if lr.dim() != 4 or lr.shape[1] != self.in_channels:
            raise ValueError(
                f"lr must have shape (B, {self.in_channels}, H, W), not {tuple(lr.shape)}{self._as_another_unshuffle(lr)}"
            )
        if any(side % self.unshuffle for side in lr.shape[2:]):
            height, width = lr.shape[2:]
            raise ValueError(
                f"the sides of lr must be multiples of {self.unshuffle} for this generator, whose first layer is a pixel "
                f"unshuffle, not {height}×{width}; pad or crop the image"
            )

    def _as_another_unshuffle(self, lr: Tensor) -> str:
        """Advice if these weights, after another pixel unshuffle, could read images like lr."""
        read = self.in_channels * self.unshuffle**2
        for side in (2**doubling for doubling in range(len(self.conv_up) + 1)):
            if lr.dim() == 4 and read == lr.shape[1] * side**2:
                return (
                    f"; if the weights come from a published file, which does not say how its {read} channels are made, read "
                    f"it by RRDB.from_pretrained(file, unshuffle={side})"
                )
        return ""

    @staticmethod
    def _conv(x: Tensor, conv: nn.Conv2d, method: ConvolutionMethod | None) -> Tensor:
        return convolution(x, conv.weight, conv.bias, method)

    @classmethod
    def _upsample(cls, fea: Tensor, conv: nn.Conv2d, method: ConvolutionMethod | None) -> Tensor:
        return F.leaky_relu(cls._conv(F.interpolate(fea, scale_factor=2, mode="nearest"), conv, method), SLOPE)
