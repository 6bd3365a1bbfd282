"""The parts that the encoders are made of: convolutions, dense blocks, and the residual blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.engine.dense_block import dense_block
from ncsr_fast.engine.residual_blocks import has_residual_blocks, residual_blocks
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution
from ncsr_fast.ops.plain_dense_blocks import DenseBlocks

SLOPE = 0.2  # of every LeakyReLU
ENGINE = ConvolutionMethod()
RESIDUAL = 0.2  # weight of a dense block's, and of a block's, residual branch
NOISE = 0.1  # standard deviation of nESRGAN+'s noise, relative to the features it multiplies
Block = Callable[[Tensor, ConvolutionMethod | None], Tensor]


def conv3x3(inputs: int, outputs: int, scale: float | None = None) -> nn.Conv2d:
    """A 3×3 convolution; with `scale`, initialised as ESRGAN's residual blocks are (Kaiming normal × scale)."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    if scale is not None:
        nn.init.kaiming_normal_(conv.weight, a=0, mode="fan_in")
        conv.weight.data.mul_(scale)
        nn.init.zeros_(conv.bias)
    return conv


def convolved(x: Tensor, conv: nn.Conv2d, method: ConvolutionMethod | None) -> Tensor:
    """The convolution of x by `conv`, of a 3×3 or 1×1 kernel; `method` as for `ncsr_fast.ops.conv3x3.convolution`."""
    return convolution(x, conv.weight, conv.bias, method)


class ResidualNoise(nn.Module):
    """Gaussian noise proportional to the features, y · (1 + 0.1 · n), in training mode and where it is `active`.

    draw  makes n, standard normal numbers, of y. By default PyTorch's global generator does, as for dropout; another
          function may be put in its place, to give the noise or a generator of one's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.draw = torch.randn_like

    def forward(self, y: Tensor) -> Tensor:
        """y with its noise, in training where there is one."""
        return y * (1 + NOISE * self.draw(y)) if self.active and self.training else y


class DenseBlock(nn.Module):
    """Five convolutions, each reading everything before it; `x + 0.2 · conv5(...)`.

    residual  ESRGAN+'s (Rakotonirina and Rasoanaivo 2020): a 1×1 convolution of x is added to the output of conv2, and
              the sum to that of conv4
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
        return self.noise(dense_block(x, self.convolutions(), SLOPE, RESIDUAL, method))

    def convolutions(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of the five convolutions."""
        return [(conv.weight, conv.bias) for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)]

    def _with_residuals(self, x: Tensor, method: ConvolutionMethod | None) -> Tensor:
        def joined(conv: nn.Conv2d, *features: Tensor) -> Tensor:
            return convolved(torch.cat(features, dim=1), conv, method)

        x1 = F.leaky_relu(joined(self.conv1, x), SLOPE)
        x2 = F.leaky_relu(joined(self.conv2, x, x1), SLOPE) + joined(self.conv1x1, x)
        x3 = F.leaky_relu(joined(self.conv3, x, x1, x2), SLOPE)
        x4 = F.leaky_relu(joined(self.conv4, x, x1, x2, x3), SLOPE) + x2
        return torch.add(x, joined(self.conv5, x, x1, x2, x3, x4), alpha=RESIDUAL)


class ResidualBlock(nn.Module):
    """Residual-in-residual dense block: three dense blocks in a residual of their own."""

    def __init__(self, channels: int, growth: int, dense_residual: bool = False) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth, dense_residual) for _ in range(3))
        self.noise = ResidualNoise()

    def forward(self, x: Tensor, method: ConvolutionMethod | None = ENGINE) -> Tensor:
        """The block's output, of the shape of x."""
        y = x
        for dense in self.dense_blocks():
            y = dense(y, method)
        return self.noise(torch.add(x, y, alpha=RESIDUAL))

    def dense_blocks(self) -> tuple[DenseBlock, DenseBlock, DenseBlock]:
        """The dense blocks, the first first."""
        return self.rdb1, self.rdb2, self.rdb3

    def is_plain(self) -> bool:
        """True where nothing is in the block but convolutions, LeakyReLUs and the residuals: no 1×1 convolutions, no noise."""
        noises = [module.active for module in self.modules() if isinstance(module, ResidualNoise)]
        return self.rdb1.conv1x1 is None and not (self.training and any(noises))


def trunk(
    start: Callable[[], Tensor],
    blocks: Iterable[Block],
    last: nn.Conv2d,
    stacked_blocks: Sequence[int],
    long_skip: str,
    method: ConvolutionMethod | None,
) -> tuple[Tensor, Tensor | None]:
    """The output of residual blocks, the convolution behind them and the long skip; and the outputs of some of the blocks.

    Args:
        start: Returns (B, C, H, W), what the first block reads. It is called once, and what it returns is freed as soon as no
            block and no long skip reads it.
        blocks: The `ResidualBlock`s, or what evaluates them.
        last: The convolution of the last block's output.
        stacked_blocks: Indices of the blocks whose outputs are returned.
        long_skip: What the convolution is added to: "conv_first", what the first block reads; "last_block", the last block's
            output.
        method: As for `ncsr_fast.ops.conv3x3.convolution`.

    Returns:
        (B, C, H, W), and the outputs of the blocks in the order of `stacked_blocks` as (B, n·C, H, W), None where n is 0.
    """
    first = start()
    outputs = _outputs(first, list(blocks), set(stacked_blocks), method)
    fea = outputs.pop(None)
    skipped = first if long_skip == "conv_first" else fea
    del first
    # without the dictionary they are freed once they are joined
    stacked = torch.cat([outputs.pop(index) for index in stacked_blocks], dim=1) if stacked_blocks else None
    return skipped + convolved(fea, last, method), stacked


def _outputs(
    first: Tensor, blocks: Sequence[Block], wanted: set[int], method: ConvolutionMethod | None
) -> dict[int | None, Tensor]:
    """The outputs of blocks by their number; None is that of the last one."""
    plain = [block for block in blocks if isinstance(block, ResidualBlock) and block.is_plain()]
    if method is not None and plain and len(plain) == len(blocks) and has_residual_blocks(first, method):
        kept = sorted({*wanted, len(blocks) - 1})
        pairs = [pair for block in plain for dense in block.dense_blocks() for pair in dense.convolutions()]
        form = DenseBlocks(dense=3, convolutions=5, kept=tuple(kept), slope=SLOPE, residual=RESIDUAL)
        found = residual_blocks(first, pairs, form, method)
        return {**dict(zip(kept, found)), None: found[-1]}
    fea, outputs = first, {}
    for index, block in enumerate(blocks):
        fea = block(fea, method)
        if index in wanted:
            outputs[index] = fea
    return {**outputs, None: fea}


def averaged(fea: Tensor, factor: int) -> Tensor:
    """Features at 1/`factor` of their size, an even number: the mean of the middle 2×2 of each cell of factor×factor.

    That is bilinear interpolation with half-pixel centres and without antialiasing.
    """
    skipped = factor // 2 - 1
    return F.avg_pool2d(fea[..., skipped:, skipped:], 2, stride=factor)
