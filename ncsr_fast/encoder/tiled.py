"""Parts of encoders of large LR images: blocks in tiles, and features above LR resolution that are made where they are wanted.

The blocks are evaluated one after the other, each in tiles with a halo as wide as the block reaches, so that every block reads
what it would read of the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.engine.condition import Condition, Features, stacked_region
from ncsr_fast.engine.memory import budget
from ncsr_fast.engine.tiles import PIXEL, in_tiles
from ncsr_fast.layout import in_a_graph
from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.ops.conv3x3 import ConvolutionMethod
from ncsr_fast.warn import warn_caller

Doubling = Callable[[Tensor], Tensor]  # ×2 by nearest neighbour, a 3×3 convolution, a map of single pixels
_SMALLEST, _LARGE = 64, 256  # LR pixels a side of a tile, where a block has a halo of 15


class TiledBlock:
    """A block, evaluated in tiles.

    Args:
        block: A module whose 3×3 convolutions read each other's output, one after the other.
        side: Pixels a side of a tile, at most.
    """

    def __init__(self, block: nn.Module, side: int) -> None:
        self.block, self.side = block, side
        convolutions = (module for module in block.modules() if isinstance(module, nn.Conv2d))
        self.halo = sum(PIXEL * (convolution.kernel_size == (3, 3)) for convolution in convolutions)

    def __call__(self, x: Tensor, method: ConvolutionMethod | None) -> Tensor:
        """The block's output, of the shape of x."""
        return in_tiles(partial(self.block, method=method), x, self.side, self.halo)


class DeferredFeatures(NamedTuple):
    """Features of a level above LR resolution that are made of those of LR resolution where they are wanted.

    Args:
        base: (B, c, H, W), of LR resolution.
        doublings: One for each doubling.
        stacked: (B, s, H, W), or None.
    """

    base: Tensor
    doublings: tuple[Doubling, ...]
    stacked: Tensor | None

    @property
    def batch(self) -> int:
        """The number of images."""
        return self.base.shape[0]

    @property
    def multiple(self) -> int:
        """Of which the borders of a `region` must be multiples."""
        return 2 ** len(self.doublings)

    @property
    def size(self) -> torch.Size:
        """(h, w) of the level."""
        return torch.Size([self.multiple * side for side in self.base.shape[2:]])

    @property
    def whole(self) -> Features:
        """The features of the whole level."""
        return self.region(*(slice(0, side) for side in self.size))

    def region(self, rows: slice, columns: slice) -> Features:
        """The features of some rows and columns of the level."""
        own = _grown(self.base, self.doublings, (rows, columns))
        return Features(own, stacked_region(self.stacked, self.size, rows, columns))

    def sample(self, index: int) -> DeferredFeatures:
        """The features of one image of the batch, which keeps its dimension."""
        image = slice(index, index + 1)
        return DeferredFeatures(self.base[image], self.doublings, None if self.stacked is None else self.stacked[image])


def _grown(base: Tensor, doublings: Sequence[Doubling], wanted: tuple[slice, slice]) -> Tensor:
    """Rows and columns of `base` after the doublings, each of which reads a pixel more on every side."""
    if not doublings:
        return base[(..., *wanted)]
    sizes = [side << len(doublings) for side in base.shape[2:]]
    below, inner = [], []
    for edge, size in zip(wanted, sizes):
        first, last = max(edge.start - PIXEL, 0) // 2, min(edge.stop + PIXEL + 1, size) // 2
        below.append(slice(first, last))
        inner.append(slice(edge.start - 2 * first, edge.stop - 2 * first))
    grown = doublings[-1](_grown(base, doublings[:-1], (below[0], below[1])))
    return grown[(..., *inner)]


def condition(encoder: Any, lr: Tensor, method: ConvolutionMethod | None, tile: int | str | None) -> Condition:
    """The condition that an encoder makes of LR images, in tiles where `tile` asks for them and the encoder can.

    Args:
        encoder: An `Encoder`, one that has `condition_in_tiles` and `condition_bytes` as `RRDB` or not.
        lr: (B, C, H, W).
        method: Of its convolutions.
        tile: None: whole. A number: in tiles of so many LR pixels, at least 64, a side. "auto": whole where that fits into what
            memory is free; else, and where memory runs out nevertheless, in tiles.
    """
    if tile is None or not hasattr(encoder, "condition_in_tiles"):
        return encoder.condition(lr, method)
    if tile != "auto":
        return encoder.condition_in_tiles(lr, method, max(int(tile), _SMALLEST))
    recorded = torch.is_grad_enabled() and (lr.requires_grad or any(weight.requires_grad for weight in encoder.parameters()))
    if recorded or in_a_graph():
        return encoder.condition(lr, method)
    pixels, each = lr[:, :1].numel(), encoder.condition_bytes(lr.element_size(), False)
    if each * pixels <= budget(lr.device):
        try:
            return encoder.condition(lr, method)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        warn_caller(f"memory ran out in the encoder, which is evaluated in tiles of {_SMALLEST} LR pixels")
        return encoder.condition_in_tiles(lr, method, _SMALLEST)
    return encoder.condition_in_tiles(lr, method, _LARGE)
