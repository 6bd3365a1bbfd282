"""Confidence intervals of means over images, by the bootstrap: images are drawn anew, with replacement, many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
_AT_ONCE = 500  # resamples in memory


class Interval(NamedTuple):
    """Percentile interval of a mean."""

    low: float
    high: float


def mean_interval(
    values: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The interval that the mean of so many images lies in at this level; None for fewer than two, or values not finite.

    Args:
        values: One an image.
        level: Share of the resampled means in the interval.
        resamples: Their number.
        seed: Of the draws: the same values have the same interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2 or not np.isfinite(sample).all():
        return None
    generator = np.random.default_rng(seed)
    rows = [min(_AT_ONCE, resamples - start) for start in range(0, resamples, _AT_ONCE)]
    means = np.concatenate([sample[generator.integers(0, sample.size, (count, sample.size))].mean(axis=1) for count in rows])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired_interval(
    first: Sequence[float], second: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The interval of the mean of `second` less that of `first`, of the same images in the same order.

    Images that are hard for one method are so for the other: the differences of images vary less than their values. None as
    for `mean_interval`.

    Raises:
        ValueError: The two are not of as many images.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need as many values of both: there are {len(first)} and {len(second)}")
    return mean_interval([b - a for a, b in zip(first, second)], level, resamples, seed)
