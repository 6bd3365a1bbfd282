"""Tiles that change nothing: where they lie in a level, and how large the halo is that their pixels depend on.

A tile is decoded with a halo of pixels around it, cut off at the borders of the image. Convolutions take what lies beyond the
cut for zeros, as beyond a border; that goes wrong by as many pixels as the convolutions between reach, and the halo is as wide.
"""

from __future__ import annotations

from typing import NamedTuple

from ncsr_fast.engine.plan import Level

PIXEL = 1  # that a 3×3 convolution reaches


class Span(NamedTuple):
    """One axis of a tile.

    Args:
        core: The pixels of the tile.
        crop: The pixels that are computed, its halo included.
    """

    core: slice
    crop: slice

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


def halo(level: Level) -> int | None:
    """How far, in pixels of the level, what a pixel is decoded to depends on the state and the latent of a level.

    A network that reads the state reaches its own radius farther than its input did; one that reads the condition alone, whose
    features are cropped as the state is, no farther than its radius. None where networks do not say their radius.
    """
    reach = PIXEL if level.split_channels else 0
    for step in reversed(range(level.steps)):
        for branch in reversed(level.branches):
            if branch.steps is not None and step < level.steps - branch.steps:
                continue
            radius = getattr(level.networks(branch), "radius", None)
            if radius is None:
                return None
            reach = max(reach, radius) if branch.changes_all else reach + radius
    return reach
