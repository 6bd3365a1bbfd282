"""The RRDB network: ESRGAN's generator (Wang et al. 2018) and its relatives, and the encoder of the flow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast import files
from ncsr_fast.checkpoints.state_dicts import Entry
from ncsr_fast.checks import check_like
from ncsr_fast.encoder import checkpoints
from ncsr_fast.encoder.blocks import ENGINE, SLOPE, Block, ResidualBlock, averaged, conv3x3, convolved, trunk
from ncsr_fast.encoder.names import encoder_layout, published_layout
from ncsr_fast.encoder.tiled import DeferredFeatures, TiledBlock
from ncsr_fast.engine.condition import Condition, Features, LevelFeatures
from ncsr_fast.hub import find_model
from ncsr_fast.ops.conv3x3 import ConvolutionMethod

LONG_SKIPS = ("conv_first", "last_block")
TRAINING_NOISE = ("none", "dense", "all")


class RRDB(nn.Module):
    """ESRGAN's ×`scale` generator, or the encoder of the flow, which is the same network but for its long skip.

    `forward(lr)` is the super-resolved image. `features(lr)` are the conditioning features of the flow's levels, from the
    HR side, without the HR part of the network, which they do not need.

    Args:
        scale: A power of two.
        channels: Width of the features.
        growth: Channels that each convolution of a dense block adds.
        blocks: Number of residual-in-residual dense blocks.
        stacked_blocks: Indices of the blocks whose outputs `features` appends; none for a generator alone.
        long_skip: What the convolution after the blocks is added to: "conv_first", the output of the first convolution, as
            in ESRGAN, BasicSR, Real-ESRGAN and ESRGAN+; or "last_block", that of the last block, as in the encoders of
            SRFlow and NCSR.
        unshuffle: Side of the pixel blocks that become channels before the first convolution, a power of two: 2 in BasicSR's
            ×2 generators, 4 in its ×1 ones. The sides of the image must be multiples of it.
        in_channels: Channels of the image given, before the unshuffle.
        out_channels: Channels of the image returned.
        dense_residual: ESRGAN+'s dense blocks, which have residuals inside.
        training_noise: Where features are multiplied by Gaussian noise in training mode: "none"; "dense", after each dense
            block, as nESRGAN+ is trained; "all", after each block as well. It may be changed later:
            `generator.training_noise = "none"`.
        level_scales: Sides of the features of each level of the flow over those of the LR image, from the HR side: powers of
            two, none above `scale`. None: SRFlow's, scale/2 … 1 and 1/2. SRFlow-DA has the same but for the 1/2, its
            one-level variant -S 1 for every split, CTFlow 1/2, 1/4 and 1/8 with the files of a ×4 generator.
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
        level_scales: Sequence[float] | None = None,
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
        doublings = max(len(self.conv_up) - 1, 0)
        sizes = (2**doubling for doubling in range(doublings, -1, -1))
        self.level_scales = (*sizes, 0.5) if level_scales is None else tuple(level_scales)
        if not all(math.frexp(side)[0] == 0.5 and side <= 2 ** len(self.conv_up) for side in self.level_scales):
            raise ValueError(
                f"level_scales must be powers of two up to {2 ** len(self.conv_up)}, from the HR side, not {level_scales!r}"
            )

    @property
    def condition_channels(self) -> int:
        """Channels of the conditioning features u of every level."""
        return self.channels * (1 + len(self.stacked_blocks))

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
            for dense in block.dense_blocks():
                dense.noise.active = value != "none"

    def head(self) -> list[nn.Module]:
        """The modules that only the super-resolved image uses: upsamplings above the largest level, and what follows."""
        return [*self.conv_up[self._doublings() :], self.conv_hr, self.conv_last]

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
            "level_scales": list(self.level_scales),
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
        return convolved(F.leaky_relu(convolved(fea, self.conv_hr, method), SLOPE), self.conv_last, method)

    def features(self, lr: Tensor) -> list[Tensor]:
        """Conditioning features u of the levels, from the HR side.

        A level gets (B, condition_channels, h, w), h and w its `level_scales` times those of lr: the features of that size,
        then the stacked block outputs resized to it by nearest neighbour. This is the reference, without the engine, as
        `pyramid` with `method=None` is.
        """
        return [features.joined for features in self.condition(lr, method=None).features]

    def pyramid(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> tuple[list[Tensor], Tensor | None]:
        """The features of each level's own resolution, from the HR side, and the stacked block outputs at LR resolution.

        At LR size the former are the trunk's output, above it they are *after* the LeakyReLU (the published encoder applies it
        in place), and below it they are averages (`ncsr_fast.encoder.blocks.averaged`). In the dtype and layout of lr, whose
        sides are multiples of what the smallest level divides them by. `method` as for
        `ncsr_fast.ops.conv3x3.convolution`.
        """
        own, stacked = self._trunk(lr, method)
        found: dict[float, Tensor] = {1: own}
        for doubling, conv in enumerate(self.conv_up[: self._doublings()], start=1):
            own = found[2**doubling] = self._upsample(own, conv, method)
        for scale in {scale for scale in self.level_scales if scale < 1}:
            found[scale] = averaged(found[1], round(1 / scale))
        return [found[scale] for scale in self.level_scales], stacked

    def condition(self, lr: Tensor, method: ConvolutionMethod | None = ENGINE) -> Condition:
        """The condition of a flow's levels, of LR images as `pyramid` takes: see `ncsr_fast.engine.condition.Encoder`."""
        pyramid, stacked = self.pyramid(lr, method)
        return Condition([Features(own, stacked) for own in pyramid])

    def condition_in_tiles(self, lr: Tensor, method: ConvolutionMethod | None, side: int) -> Condition:
        """As `condition`, in little memory: blocks in tiles of up to `side` LR pixels a side, larger features where wanted."""
        noisy = self.training and self.training_noise != "none"  # drawn for the whole image
        own, stacked = self._trunk(lr, method, self.body if noisy else [TiledBlock(block, side) for block in self.body])
        found: list[LevelFeatures] = []
        for scale in self.level_scales:
            if scale > 1:
                convolutions = self.conv_up[: int(math.log2(scale))]
                doublings = tuple(partial(self._upsample, conv=conv, method=method) for conv in convolutions)
                found.append(DeferredFeatures(own, doublings, stacked))
            else:
                found.append(Features(own if scale == 1 else averaged(own, round(1 / scale)), stacked))
        return Condition(found)

    def condition_bytes(self, element_size: int, tiled: bool) -> int:
        """Bytes an LR pixel that the condition takes, with numbers of so many bytes: that of `condition`, or that in tiles.

        Block outputs are copied when they are stacked, before the larger features are made; of a dense block there is its
        buffer too where it is not one of a tile.
        """
        stacked, widths = len(self.stacked_blocks), sum(scale**2 for scale in self.level_scales if scale <= 1 or not tiled)
        within = max(stacked + 3 + (0 if tiled else 1 + 4 * self.growth / self.channels), 2 * stacked + 1, stacked + widths)
        return round(element_size * self.channels * within)

    def feature_bytes(self, element_size: int, tiled: bool) -> int:
        """Bytes an LR pixel of the condition itself, once it is made: features of every level, stacked block outputs."""
        scales = {scale for scale in self.level_scales if scale <= 1 or not tiled} | ({1} if tiled else set())
        return round(element_size * self.channels * (len(self.stacked_blocks) + sum(scale**2 for scale in scales)))

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

    def layout(self) -> Iterator[Entry]:
        """Every tensor of the network, by SRFlow's names, in the order of a published file."""
        return encoder_layout(self)

    def _doublings(self) -> int:
        """How many of the upsamplings the levels of the flow use."""
        return max(0, int(math.log2(max(self.level_scales))))

    def _trunk(
        self, lr: Tensor, method: ConvolutionMethod | None, blocks: Iterable[Block] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x = F.pixel_unshuffle(lr, self.unshuffle) if self.unshuffle > 1 else lr
        first = convolved(x, self.conv_first, method)
        return trunk(first, blocks or self.body, self.conv_body, self.stacked_blocks, self.long_skip, method)

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
    def _upsample(fea: Tensor, conv: nn.Conv2d, method: ConvolutionMethod | None) -> Tensor:
        return F.leaky_relu(convolved(F.interpolate(fea, scale_factor=2, mode="nearest"), conv, method), SLOPE)
