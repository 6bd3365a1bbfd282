"""The walk over the levels of a flow in decoding, shared by all code that decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor


class HasSplit(Protocol):
    """Interface of a level with a split, in whatever form it is evaluated."""

    split_channels: int


AnyLevel = TypeVar("AnyLevel", bound=HasSplit)


def downward(levels: Sequence[AnyLevel], latents: Sequence[Tensor]) -> Iterator[tuple[int, AnyLevel, Tensor | None]]:
    """The levels from the top, each with its number and the latent of its split (None without a split).

    Args:
        levels: The levels, from the HR side.
        latents: The latents of the splits in encoding order, then the top latent, with which decoding begins.

    Example:
        >>> z = latents[-1]
        >>> for index, level, latent in downward(levels, latents):
        ...     z, logdet = level.decode(z, latent)
    """
    taken = list(latents[:-1])
    for index in reversed(range(len(levels))):
        yield index, levels[index], taken.pop() if levels[index].split_channels else None
