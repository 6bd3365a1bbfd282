"""The largest magnitudes of a state on its way through the steps, by which samples that blew up are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Peaks(list[Tensor]):
    """The largest magnitude (B,) of the state at each of its stations, NaN where it holds one.

    Args:
        rows: Of the state that count; all but the halo of a tile.
        columns: Likewise.
    """

    def __init__(self, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        super().__init__()
        self.window = rows, columns

    @property
    def is_whole(self) -> bool:
        """True where all of the state counts."""
        return self.window == (slice(None), slice(None))

    def add(self, x: Tensor) -> None:
        """Add the next station's state x (B, C, h, w)."""
        self.append(x.detach()[(..., *self.window)].abs().amax(dim=(1, 2, 3)))


def largest(parts: Sequence[Peaks]) -> list[Tensor]:
    """Of the peaks of several tiles, station by station, the largest."""
    found = list(parts[0])
    for part in parts[1:]:
        found = [torch.maximum(peak, other) for peak, other in zip(found, part)]
    return found
