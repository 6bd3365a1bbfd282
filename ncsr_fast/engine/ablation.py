"""Switches that turn parts of the engine off, for benchmarks that measure what each of them brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class Ablation(NamedTuple):
    """The parts of the engine that can be switched off.

    Args:
        subpixel: Convolve upsampled features at the resolution they had before.
        winograd: Convolve 3×3 on a CPU by Winograd's algorithm.
        channels_last: Lay the state and the features out channels-last.
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
    """Set switches inside a `with` statement, for the whole process: `ablated(winograd=False)` turns one off."""
    global _current
    before, _current = _current, _current._replace(**switches)
    try:
        yield
    finally:
        _current = before
