"""A whole level on the engine: what `ncsr_fast.nn.level.FlowLevel` defines, with what does not depend on the state hoisted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast import ops
from ncsr_fast.autocast import without_autocast
from ncsr_fast.engine.cache import Cache
from ncsr_fast.engine.conditioning import (
    Features,
    FoldedNetworks,
    LevelParameters,
    conditions,
    fold_level,
    hoist,
    hoist_noise,
    level_of,
    mix_level,
    prepare,
)
from ncsr_fast.engine.convolution import ConvolutionMethod, convolution
from ncsr_fast.engine.folding import LOG_SCALE
from ncsr_fast.engine.level import Settings, steps
from ncsr_fast.engine.level_gradient import level_pass
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.layout import laid_out, traced

Peaks = list[Tensor] | None
Decoder = Callable[[Tensor, Tensor | None, Peaks], tuple[Tensor, Tensor]]


class FlowLevel(LevelParameters, Protocol):
    """The rest of what the engine reads of a level."""

    split_channels: int
    split_weight: Tensor
    split_bias: Tensor
    split_logs: Tensor
    eps: float
    cache: Cache

    def parameters(self) -> list[Tensor]: ...


def encode_level(
    level: FlowLevel, z: Tensor, features: Features, noise: Tensor | None, options: EngineOptions
) -> tuple[Tensor, Tensor | None, Tensor]:
    """z (B, C/4, 2h, 2w) → state of the next level, the split's latent (None without one), logdet (B,).

    noise  (B, noise channels, h, w), or None for zero
    """
    with without_autocast(z.device.type):
        x = laid_out(F.pixel_unshuffle(z, 2), options.memory_format)
        z, logdet = _all_steps(level, features, noise, options, inverse=False)(x, None)
        if not level.split_channels:
            return z, None, logdet
        z, density = ops.gaussian_split(z, _prior(level, z[:, : -level.split_channels]), backend=options.backend)
        return z[:, : -level.split_channels], z[:, -level.split_channels :], logdet + density


def level_decoder(level: FlowLevel, features: Features, noise: Tensor | None, options: EngineOptions) -> Decoder:
    """`decode(z, latent, peaks)` → (z, logdet), the inverse of `encode_level`, for any number of calls.

    Everything that does not depend on z is done here. z may have more samples than the features and the noise, which
    then have one that all of them share. To the list `peaks` is appended the largest magnitude (B,) of the state after each
    step decoded, NaN where it holds one; not where gradients are recorded.
    """
    with without_autocast(features.own.device.type):
        run = _all_steps(level, features, noise, options, inverse=True)

    def decode(z: Tensor, latent: Tensor | None, peaks: Peaks) -> tuple[Tensor, Tensor]:
        logdets = []
        with without_autocast(z.device.type):
            if latent is not None:
                joined, h = torch.cat([z, latent], dim=1), _prior(level, z)
                z, density = ops.gaussian_split(joined, h, inverse=True, backend=options.backend)
                logdets.append(density)
            z, logdet = run(laid_out(z, options.memory_format), peaks)
            return F.pixel_shuffle(z, 2), torch.stack([logdet, *logdets]).sum(dim=0)

    return decode


def _all_steps(
    level: FlowLevel, features: Features, noise: Tensor | None, options: EngineOptions, inverse: bool
) -> Callable[[Tensor, Peaks], tuple[Tensor, Tensor]]:
    """The steps of a level, transitions included, as a function of the squeezed state."""
    like, own = level.actnorm_bias, features.own
    settings = Settings(level.eps, inverse, ops.resolve_backend("engine", options.backend, like), options.method)
    dtype = options.network_dtype(like.dtype)
    pixels = own.shape[2] * own.shape[3]

    if torch.is_grad_enabled():
        networks, mixing = fold_level(level, dtype), mix_level(level, inverse)
        steps_of = level_of(networks, mixing)
        pre = hoist(networks, features, options), hoist_noise(networks, noise, own, options)

        def run_recorded(x: Tensor, _: Peaks) -> tuple[Tensor, Tensor]:
            hoisted, of_noise = (None if part is None else part.expand(x.shape[0], -1, -1, -1) for part in pre)
            y, logdet = level_pass(x, hoisted, of_noise, steps_of, settings, options.checkpoint)
            return y, logdet + mixing.logdet * pixels

        return run_recorded

    mixers = (level.actnorm_bias, level.actnorm_logs, level.invconv)
    mixing = level.cache.get(("mixing", inverse), mixers, lambda: mix_level(level, inverse))
    enlarged = options.subpixel and features.enlarged and not traced()

    def fold() -> FoldedNetworks:
        networks = fold_level(level, dtype)
        return prepare(networks, features, options) if enlarged else networks

    networks = level.cache.get(("networks", dtype, enlarged), level.parameters(), fold)
    steps_of = level_of(networks, mixing)
    given = conditions(networks, features, noise, settings, options)

    def run(x: Tensor, peaks: Peaks) -> tuple[Tensor, Tensor]:
        y, logdet = steps(x, given, steps_of, settings, peaks=peaks)
        return y, logdet + mixing.logdet * pixels

    return run


def _prior(level: FlowLevel, z1: Tensor) -> Tensor:
    """Mean and log-deviation of what the split takes out: Glow's zero-initialised convolution of z1."""
    scale = torch.exp(LOG_SCALE * level.split_logs)
    return convolution(z1, level.split_weight * scale[:, None, None, None], level.split_bias * scale, ConvolutionMethod())
