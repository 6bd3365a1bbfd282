"""Preparation of a batch on the device, from the bytes of its crops and the random numbers of its step."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.data.perturb import degrade, perturbed
from ncsr_fast.training.settings import TrainSettings


class Draws(NamedTuple):
    """The random numbers of a step, drawn before it, so that the step itself can be captured as a graph."""

    std: Tensor  # (B, 1, 1, 1), uniform in [0, 1)
    noise: Tensor  # (B, 3, crop, crop), standard normal
    flips: Tensor  # (B,) bool
    turns: Tensor  # (B,) int64, 0 to 3

    @classmethod
    def at_step(cls, step: int, settings: TrainSettings, generator: torch.Generator, share: slice = slice(None)) -> Draws:
        """The random numbers of the crops `share` of a step, which depend on seed, step and place in the batch.

        Every process draws the numbers of the whole batch, so that the noise does not depend on the number of processes.
        """
        # hashed, because a CPU's generator reads only the low 32 bits of a seed
        generator.manual_seed(random.Random(f"{settings.seed}/noise/{step}").getrandbits(63))
        batch, options = settings.batch, {"generator": generator, "device": generator.device}
        drawn = cls(
            std=torch.rand(batch, 1, 1, 1, dtype=torch.float32, **options),
            noise=torch.randn(batch, 3, settings.crop, settings.crop, dtype=torch.float32, **options),
            flips=torch.rand(batch, dtype=torch.float32, **options) < (0.5 if settings.flip else 0.0),
            turns=torch.randint(4 if settings.rotate else 1, (batch,), **options),
        )
        return cls(*(tensor[share] for tensor in drawn))


class Batch(NamedTuple):
    """The inputs of the losses; images are in [0, 1] except for the noise."""

    hr: Tensor
    lr: Tensor
    noisy_hr: Tensor
    noisy_lr: Tensor
    noise: Tensor | None  # noise condition of the flow


def prepare(hr: Tensor, lr: Tensor | None, draws: Draws, settings: TrainSettings) -> Batch:
    """The batch of uint8 crops (B, 3, crop, crop) and their LR (None: bicubic): flipped, turned, with NCSR's noise."""
    hr = augmented(hr, draws)
    lr = degrade(hr, settings.model.scale) if lr is None else augmented(lr, draws)
    hr, lr = to_float(hr), to_float(lr)
    std = settings.max_std * draws.std
    noisy_hr, noisy_lr, noise = perturbed(hr, lr, std, draws.noise, noise_channels=settings.model.noise_channels)
    return Batch(hr, lr, noisy_hr, noisy_lr if settings.lr_noise else lr, noise)


def augmented(images: Tensor, draws: Draws) -> Tensor:
    """Square images (B, C, S, S), mirrored if `flips`, then turned counter-clockwise by `turns` quarters."""
    flips, turns = draws.flips[:, None, None, None], draws.turns[:, None, None, None]
    images = torch.where(flips, images.flip(3), images)
    images = torch.where(turns >= 2, images.flip((2, 3)), images)
    return torch.where(turns % 2 == 1, torch.rot90(images, 1, dims=(2, 3)), images)
