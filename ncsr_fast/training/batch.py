"""Preparation of a batch on the device, from the bytes of its crops and the random numbers of its step."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.data.low_light import low_light_input
from ncsr_fast.data.perturb import degrade, perturbed
from ncsr_fast.flow.inputs import enlarged
from ncsr_fast.training.settings import TrainSettings


class Draws(NamedTuple):
    """The random numbers of a step, drawn before it, so that the step itself can be captured as a graph."""

    std: Tensor  # (B, 1, 1, 1), uniform in [0, 1)
    noise: Tensor  # (B, 3, crop, crop), standard normal
    flips: Tensor  # (B,) bool
    turns: Tensor  # (B,) int64, 0 to 3
    reference: Tensor  # (B,) bool, all alike: the mean of the prior is the reference's

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
            reference=(torch.rand(1, dtype=torch.float32, **options) < settings.reference_prior).repeat(batch),
        )
        return cls(*(tensor[share] for tensor in drawn))


class Batch(NamedTuple):
    """What the losses see; images in [0, 1] but for the noise and the base."""

    hr: Tensor
    lr: Tensor
    target: Tensor  # what the flow is of: hr, or its residual of the base that lr is enlarged to
    noisy_target: Tensor
    noisy_lr: Tensor
    noise: Tensor | None  # noise condition of the flow


def prepare(hr: Tensor, lr: Tensor | None, draws: Draws, settings: TrainSettings) -> Batch:
    """uint8 crops (B, 3, crop, crop) and their LR → flipped, turned, in floats, with noise.

    LR images are those of `stacked`; None: bicubic, made here.
    """
    hr = augmented(hr, draws)
    lr = network_input(degrade(hr, settings.model.scale) if lr is None else augmented(lr, draws))
    hr = to_float(hr)
    target = residual(hr, lr, settings)
    std = settings.max_std * (torch.ones_like(draws.std) if settings.fixed_std else draws.std)
    channels = settings.model.noise_channels
    noisy = perturbed(target, lr, std, draws.noise, noise_channels=channels, lr_noise=settings.lr_noise)
    return Batch(hr, lr, target, *noisy)


def stacked(batch: dict[str, Tensor]) -> Tensor | None:
    """The LR crops of a batch of `RandomCrops`, those of low light with their equalized ones: uint8 (B, 3 or 6, h, w)."""
    parts = [batch[name] for name in ("lr", "equalized") if name in batch]
    return torch.cat(parts, dim=1) if parts else None


def network_input(lr: Tensor) -> Tensor:
    """What encoders read of uint8 LR images (…, 3, h, w), or of dark images stacked with the equalized ones (…, 6, h, w)."""
    return to_float(lr) if lr.shape[-3] == 3 else low_light_input(lr[..., :3, :, :], lr[..., 3:, :, :])


def residual(hr: Tensor, lr: Tensor, settings: TrainSettings) -> Tensor:
    """What the flow is of: hr, or hr less the base that lr is enlarged to (FS-NCSR)."""
    base = enlarged(lr, settings.model.flow)
    return hr if base is None else hr - base


def augmented(images: Tensor, draws: Draws) -> Tensor:
    """Square images (B, C, S, S), mirrored if `flips`, then turned counter-clockwise by `turns` quarters."""
    flips, turns = draws.flips[:, None, None, None], draws.turns[:, None, None, None]
    images = torch.where(flips, images.flip(3), images)
    images = torch.where(turns >= 2, images.flip((2, 3)), images)
    return torch.where(turns % 2 == 1, torch.rot90(images, 1, dims=(2, 3)), images)
