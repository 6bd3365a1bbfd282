"""Switches that turn parts of the engine off, for benchmarks of the effect of each part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class Ablation(NamedTuple):
    """The parts of the engine that can be switched off.

    Args:
        subpixel: Convolve upsampled features at LR resolution.
        winograd: Compute 3×3 convolutions on a CPU by Winograd's algorithm.
        channels_last: Store the state and the features channels-last.
    """

    subpixel: bool = True
    winograd: bool = True
    channels_last: bool = True


_current = Ablation()


def ablation() -> Ablation:
    """The switches in force."""
    return _current


@contextlib.contextmanager
def ablated(**switches: bool) -> Iterator[None]:
    """A context that sets switches for the whole process, such as `ablated(winograd=False)`."""
    global _current
    before, _current = _current, _current._replace(**switches)
    try:
        yield
    finally:
        _current = before
