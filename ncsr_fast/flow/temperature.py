"""Temperatures of samples: the standard deviation of their latents, one number, one of each level, or a map of LR pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.checks import check_temperature
from ncsr_fast.config import FlowConfig
from ncsr_fast.flow.inputs import pad
from ncsr_fast.synchronization import reading_is_free

Factor = float | Tensor


class Temperature:
    """The factors of standard normal latents; as a string, in words, for which values are read.

    Args:
        factors: Of each latent, a number or a tensor: of one element, or a map (B or 1, 1, 1, h, w).
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        self.factors = list(factors)

    def __str__(self) -> str:
        if any(isinstance(own, Tensor) and own.dim() for own in self.factors):
            largest = max(float(own.max()) for own in self.factors if isinstance(own, Tensor))
            return f"temperatures of a map, up to {largest:g}"
        told = [f"{float(own):g}" for own in self.factors]
        return f"temperature {told[0]}" if len(set(told)) == 1 else f"temperatures {', '.join(told)}"

    def cooled(self, factor: float) -> Temperature:
        """That times a factor."""
        return Temperature([factor * own for own in self.factors])

    def image(self, index: int) -> Temperature:
        """Of one image of the batch."""
        return Temperature([_of_image(own, index) for own in self.factors])


def _of_image(factor: Factor, index: int) -> Factor:
    if isinstance(factor, Tensor) and factor.dim() > 0 and len(factor) > 1:
        return factor[index : index + 1]
    return factor


def temperature_for(value: Any, flow: FlowConfig, lr: Tensor) -> Temperature:
    """The temperature that an argument asks for.

    Args:
        value: A number; a sequence of one number for each latent, or for each level, in the order of the latents, the coarsest
            last (that of a level without a latent has no effect); or a map (B or 1, 1, H, W) of the size of lr, each of whose
            pixels is that of the latents in it, and the mean of four that of one.
        flow: The flow.
        lr: (B, C, H, W).

    Raises:
        TypeError: It is neither.
        ValueError: Negative, infinite or NaN, or of another length or shape.
    """
    shapes = flow.latent_shapes(*lr.shape[2:])
    if isinstance(value, Tensor) and value.dim() > 1:
        return Temperature(_of_map(value, flow, lr, shapes))
    if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() == 1):
        numbers = list(value)
        for number in numbers:
            check_temperature(number)
        with_latent = [bool(level.split_channels) for level in flow.levels[:-1]] + [True]
        if len(numbers) == len(flow.levels):
            numbers = [number for number, has_latent in zip(numbers, with_latent) if has_latent]
        if len(numbers) != len(shapes):
            raise ValueError(
                f"temperature must be one number, or {len(shapes)}, one of each latent, or {len(flow.levels)}, one of each "
                f"level, not {len(numbers)}"
            )
        return Temperature(numbers)
    check_temperature(value)
    return Temperature([value] * len(shapes))


def _of_map(value: Tensor, flow: FlowConfig, lr: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Factor]:
    batch, _, height, width = lr.shape
    if value.dim() != 4 or value.shape[0] not in (1, batch) or tuple(value.shape[1:]) != (1, height, width):
        raise ValueError(
            f"a temperature map must have shape ({batch} or 1, 1, {height}, {width}), that of lr, not {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        raise TypeError(f"a temperature map must be of floats, not {value.dtype}")
    if value.device != lr.device:
        raise ValueError(f"the temperature map is on {value.device}, but lr is on {lr.device}")
    if reading_is_free(value) and not ((value >= 0) & (value < math.inf)).all():
        raise ValueError("a temperature map must have finite values of 0 or more")
    padded = pad(value.to(lr.dtype), 1, flow.lr_multiple)
    return [F.interpolate(padded, size=shape[1:], mode="area")[:, None] for shape in shapes]
