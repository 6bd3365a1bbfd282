"""Tiles that change nothing: where they lie in a level, and how large the halo is that their pixels depend on.

A tile is decoded with a halo of pixels around it, cut off at the borders of the image. Convolutions take what lies beyond the
cut for zeros, as beyond a border; that goes wrong by as many pixels as the convolutions between reach, and the halo is as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ncsr_fast.engine.plan import Level

PIXEL = 1  # that a 3×3 convolution reaches
Item = TypeVar("Item")


class Span(NamedTuple):
    """One axis of a tile.

    Args:
        core: The pixels of the tile.
        crop: The pixels that are computed, its halo included.
    """

    core: slice
    crop: slice

    @property
    def length(self) -> int:
        """The number of pixels computed."""
        return int(self.crop.stop - self.crop.start)

    @property
    def inner(self) -> slice:
        """The core as pixels of the crop."""
        return slice(self.core.start - self.crop.start, self.core.stop - self.crop.start)


def spans(size: int, side: int, halo: int, multiple: int = 1) -> list[Span]:
    """Tiles of about the same length, at most `side`, along an axis.

    Args:
        size: Of the axis, a multiple of `multiple`.
        side: The longest that a tile may be; where it is less than `multiple`, that.
        halo: Pixels on either side.
        multiple: Crops begin and end at multiples of it.
    """
    count = -(-size // max(side, multiple))
    length = -(-size // (count * multiple)) * multiple
    found = []
    for start in range(0, size, length):
        stop = min(start + length, size)
        first, last = max(start - halo, 0) // multiple * multiple, min(-(-(stop + halo) // multiple) * multiple, size)
        found.append(Span(slice(start, stop), slice(first, last)))
    return found


def halo(level: Level, inverse: bool = True) -> int | None:
    """How far, in pixels of the level, what a pixel is decoded to depends on the state and the latent of a level.

    Without `inverse`, what it is encoded to, its latent too.

    The channels that couplings pass through reach less far than the others until the next 1×1 convolution mixes them: couplings
    of one step do not add up. A network that reads the condition alone, whose features are cropped as the state is, reaches no
    farther than its radius. None where networks do not say theirs.
    """
    channels = level.actnorm_bias.shape[1]
    passed = changed = 0
    if inverse and level.split_channels:  # its mean and scale are a convolution of the channels that stay, the first ones
        passed, changed = PIXEL * (channels - level.split_channels < level.pass_through), PIXEL
    for step in _in_order(range(level.steps), inverse):
        if not inverse:  # the 1×1 convolution is behind the branches in decoding
            passed = changed = max(passed, changed)
        for branch in _in_order(level.branches, inverse):
            if branch.steps is not None and step < level.steps - branch.steps:
                continue
            radius = getattr(level.networks(branch), "radius", None)
            if radius is None:
                return None
            changed = max(changed, radius if branch.changes_all else passed + radius)
            passed = max(passed, radius) if branch.changes_all else passed
        if inverse:
            passed = changed = max(passed, changed)
    if not inverse and level.split_channels:
        mean = passed if channels - level.split_channels <= level.pass_through else max(passed, changed)
        return max(passed, changed, mean + PIXEL)
    return max(passed, changed)


def _in_order(sequence: Sequence[Item], inverse: bool) -> Iterable[Item]:
    """In the order of encoding, or of decoding."""
    return reversed(sequence) if inverse else sequence


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, side: int, halo: int) -> Tensor:
    """`function`, which leaves the size as it is, of an image (B, C, H, W) in tiles.

    Args:
        function: Its output at a pixel depends on no pixel farther than `halo`, and it takes what lies outside for zeros.
        x: The image.
        side: The longest that a tile may be.
        halo: In pixels.
    """
    rows, columns = (spans(size, side, halo) for size in x.shape[2:])
    if len(rows) == len(columns) == 1:
        return function(x)
    bands = []
    for row in rows:
        band = [function(x[..., row.crop, column.crop])[..., row.inner, column.inner].clone() for column in columns]
        bands.append(torch.cat(band, dim=3))
    return torch.cat(bands, dim=2)
