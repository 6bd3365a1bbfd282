"""The NCSR model (Kim & Son 2021): a flow on the HR image, conditioned on the LR image and on the added noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.autocast import without_autocast
from ncsr_fast.config import NCSRConfig
from ncsr_fast.engine.conditioning import Features
from ncsr_fast.engine.fused_level import encode_level, level_decoder
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.layout import laid_out
from ncsr_fast.nn import sampling
from ncsr_fast.nn.checkpoints import Checkpoints
from ncsr_fast.nn.checks import (
    check_count,
    check_finite,
    check_image,
    check_like,
    check_noise,
    check_pair,
    check_temperature,
)
from ncsr_fast.nn.encoder import RRDB
from ncsr_fast.nn.freezing import Freezing
from ncsr_fast.nn.invertibility import InvertibilityReport, check_invertibility
from ncsr_fast.nn.level import FlowLevel
from ncsr_fast.nn.padding import pad_to_even
from ncsr_fast.ops.gaussian_split import gaussian_log_density


class Encoded(NamedTuple):
    """What `NCSR.encode` returns."""

    latents: tuple[Tensor, ...]  # of the splits in encoding order, then the top-level one
    log_likelihood: Tensor  # (B,) nats


class NCSR(Checkpoints, Freezing, nn.Module):
    """NCSR or SRFlow super-resolution flow; `config` says which.

    `lr` is (B, 3, H, W) and `hr` (B, 3, sH, sW), float RGB in [0, 1], of the model's dtype and device. Both are
    what the flow sees: the caller adds the noise (`ncsr_fast.data.perturb`). `noise` conditions the flow on what
    was added: (B, 3, sH, sW) when `config.noise_channels` is 3, (B, 1, 1, 1) when it is 1, and None means zero.

    Any LR size from 1×1 is accepted. Odd sizes are padded (reflection; replication of a single row or column)
    to even ones, images returned are cropped back, and latents and likelihoods are those of the padded image.

    Everything is differentiable with respect to images and parameters. `model(hr, lr, noise)` is `model.nll(hr, lr, noise)`.
    Under `torch.autocast` the networks have the precision it asks for, as with `precision`, and the state stays float32.

    `engine`, `precision`, `checkpoint` and the rest of `EngineOptions` may be given to the constructor and to
    `from_pretrained`, and changed at any time: `model.precision = "bf16"`, `model.options = replace(model.options, …)`.
    """

    def __init__(self, config: NCSRConfig, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.options = EngineOptions(**options)
        self.encoder = RRDB(
            config.scale, config.channels, config.growth, config.blocks, config.stacked_blocks, long_skip="last_block"
        )
        for module in self.encoder.head():  # the flow does not use them, so its loss gives them no gradient
            module.requires_grad_(False)
        self.levels = nn.ModuleList(
            FlowLevel(
                channels=channels,
                steps=config.steps,
                transition_steps=config.transition_steps,
                condition_channels=config.condition_channels,
                hidden_channels=config.hidden_channels,
                noise_channels=config.noise_channels,
                noise_steps=config.noise_steps[index],
                split_channels=config.split_channels(index, channels),
                eps=config.eps,
            )
            for index, channels in enumerate(config.level_channels())
        )
        # persistent, so that a reloaded model is not initialised again from whatever batch comes first
        self.register_buffer("actnorm_initialized", torch.tensor(False))
        self.unused_published: dict[str, Tensor] = {}  # tensors of a published file that no computation reads

    @property
    def engine(self) -> str:
        """What evaluates the model: "fused", or "plain", step by step as it is defined."""
        return self.options.engine

    @engine.setter
    def engine(self, value: str) -> None:
        self.options = replace(self.options, engine=value)

    @property
    def precision(self) -> str:
        """Of the networks: "fp32", "tf32" or "bf16"."""
        return self.options.precision

    @precision.setter
    def precision(self, value: str) -> None:
        self.options = replace(self.options, precision=value)

    @property
    def checkpoint(self) -> bool:
        """Whether the backward pass computes the small networks anew instead of keeping their activations."""
        return self.options.checkpoint

    @checkpoint.setter
    def checkpoint(self, value: bool) -> None:
        self.options = replace(self.options, checkpoint=value)

    @property
    def served(self) -> EngineOptions:
        """The options of a call made now: `options`, under `torch.autocast` with the precision it asks for."""
        return self.options.under_autocast(self._like)

    # -- likelihood ------------------------------------------------------------------------------------------

    def encode(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Encoded:
        """Latents and log-likelihood of `hr` given `lr`.

        returns  `.latents`, a tuple: those of the splits in encoding order, then the top-level one, all
                 standard normal under the model; `.log_likelihood` (B,) in nats,
                 `log p(hr | lr) = Σ log|det| + Σ log N(latent; 0, 1)`
        raises   ValueError or TypeError naming the argument: shape, HR/LR sizes that do not fit the scale,
                 dtype, device, and (CPU tensors) NaN or infinite values
        """
        with self.recording():
            return self._encode(*self._prepared(lr, hr, noise))

    def forward(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return `nll(hr, lr, noise)`: what training optimises, and what wrappers of modules, hooks and `torch.compile` see."""
        return self.nll(hr, lr, noise)

    def nll(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (B,) in bits per HR pixel *position*, `-log p / (ln 2 · H · W)`.

        As in the published programs it is not divided by the three channels. H and W are the padded size.
        """
        lr, hr, noise = self._prepared(lr, hr, noise)
        with self.recording():
            return _bits(self._encode(lr, hr, noise), hr)

    @torch.no_grad()
    def initialize(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """Set every actnorm from one batch, in encoding order, and return the batch's `nll` (B,).

        Each actnorm, those inside the networks included, makes the data that reaches it zero-mean and
        unit-variance per channel. Whatever the actnorms were is overwritten.
        """
        self.refuse_when_frozen("initialize()")
        lr, hr, noise = self._prepared(lr, hr, noise)
        with without_autocast(lr.device.type):  # statistics are float32
            encoded = self._encode(lr, hr, noise, initialize=True)
        self.actnorm_initialized.fill_(True)
        return _bits(encoded, hr)

    # -- images ----------------------------------------------------------------------------------------------

    def decode(self, latents: Sequence[Tensor], lr: Tensor, noise: Tensor | None = None) -> Tensor:
        """The inverse of `encode`: latents → hr (B, 3, sH, sW), not clipped to [0, 1].

        raises  ValueError when the latents are not those of an image of this size (`latent_shapes`)
        """
        lr_padded, _, noise = self._prepared(lr, None, noise)
        height, width = lr.shape[2:]
        expected = self.latent_shapes(height, width)
        if len(latents) != len(expected):
            raise ValueError(f"latents must be {len(expected)} tensors, not {len(latents)}")
        for index, (latent, shape) in enumerate(zip(latents, expected)):
            if tuple(latent.shape) != (lr.shape[0], *shape):
                raise ValueError(f"latents[{index}] must have shape {(lr.shape[0], *shape)}, not {tuple(latent.shape)}")
            check_like(f"latents[{index}]", latent, self._like)
        with self.recording():
            hr, _ = self.decode_features(latents, self.features(lr_padded), noise)
        return hr[:, :, : height * self.config.scale, : width * self.config.scale]

    def sample(
        self,
        lr: Tensor,
        n: int = 10,
        temperature: float = 0.9,
        generator: torch.Generator | None = None,
        *,
        on_nonfinite: str = "warn",
    ) -> Tensor:
        """n super-resolved images (B, n, 3, sH, sW) of each LR image, clipped to [0, 1].

        Latents are drawn from N(0, temperature²) on the model's device from `generator` (which must be of that
        device; None is torch's default one): the same seed gives the same images, and the first m samples do not
        depend on n. The noise condition is zero, as in the published programs. The encoder, and all else that the LR
        image alone decides, is computed once for all samples.

        The inverse of a flow can explode. A pixel that overflowed is NaN, never silently black or white, and
        `on_nonfinite` says what to do about a sample whose state, at any step, was not finite or beyond ±10⁴: "warn", "raise"
        `NonFiniteSamples`, "ignore", or "retry": draw it again, up to four times, at 0.8 times the temperature before, and
        warn of those drawn again. All but "ignore" wait for the device once, after the last level.

        Call it under `torch.no_grad()` unless gradients are wanted: it is as differentiable as the rest, but then only the
        images are watched, not the states.

        raises  ValueError for n < 1, a negative temperature or another on_nonfinite, TypeError for what is no number, and as
                `encode` does for lr
        """
        check_count("n", n)
        check_temperature(temperature)
        if on_nonfinite not in sampling.ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(sampling.ON_NONFINITE)}, not {on_nonfinite!r}")
        with self.recording():
            return self.shown(sampling.sample(self, self.padded(lr), n, temperature, generator, on_nonfinite), lr)

    def check_invertibility(
        self, lr: Tensor, temperature: float = 0.9, generator: torch.Generator | None = None
    ) -> InvertibilityReport:
        """Decode one sample of each LR image step by step, and report what each step divides by and how well it is undone.

        Per step: the smallest scale of its actnorm, injector and couplings, the condition number of its 1×1 convolution,
        the round-trip error and the largest state; of the images, the error of decoding what was encoded. Scales near zero
        compound as divisors, which the likelihood does not show. `print(report)` is a table, `report.worst` the step with
        the smallest scale. Slow: without the engine, and it waits for the device at every step.

        raises  as `sample` does
        """
        check_temperature(temperature)
        return check_invertibility(self, self.padded(lr), temperature, generator)

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C, h, w) of each latent of an LR image of that size, in the order of `encode`."""
        size = [side + side % 2 for side in (height, width)]
        shapes = []
        for index, channels in enumerate(self.config.level_channels()):
            split = self.config.split_channels(index, channels)
            taken = channels if index == self.config.levels - 1 else split
            if taken:
                shapes.append((taken, *(side * self.config.scale >> (index + 1) for side in size)))
        return shapes

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _like(self) -> Tensor:
        return self.levels[0].actnorm_bias

    def _prepared(self, lr: Tensor, hr: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The arguments checked and padded."""
        self.check_frozen()
        scale, noise_channels = self.config.scale, self.config.noise_channels
        check_image("lr", lr, self._like)
        if hr is not None:
            check_image("hr", hr, self._like)
            check_pair(hr, lr, scale)
            hr = pad_to_even(hr, scale)
        if noise is not None:
            check_noise(noise, lr, scale, noise_channels)
            check_like("noise", noise, self._like)
            check_finite("noise", noise)
            if noise_channels == 3:
                noise = pad_to_even(noise, scale)
        return pad_to_even(lr), hr, noise

    def _encode(self, lr: Tensor, hr: Tensor, noise: Tensor | None, initialize: bool = False) -> Encoded:
        features = self.features(lr, initialize or self.engine == "plain")
        latents, logdet = self.encode_features(hr, features, noise, initialize)
        return Encoded(latents, logdet + gaussian_log_density(latents[-1]).sum(dim=(1, 2, 3)))

    def padded(self, lr: Tensor) -> Tensor:
        """An LR image checked, and padded to an even size."""
        return self._prepared(lr, None, None)[0]

    def shown(self, sr: Tensor, lr: Tensor) -> Tensor:
        """Decoded images (…, 3, h, w) of the padded `lr` as `sample` returns them: cropped, and clipped where finite."""
        sr = sr[..., : lr.shape[2] * self.config.scale, : lr.shape[3] * self.config.scale]
        return torch.where(sr.isfinite(), sr.clamp(0, 1), torch.nan)  # clamp alone would make an infinity look like white

    def features(self, lr: Tensor, plain: bool | None = None) -> list[Features]:
        """The condition of every level, of an LR image of even size: the encoder's part of the work, without checks.

        `plain`: as one tensor, for `FlowLevel.encode` and `decode`; None when the engine is.
        """
        if self.engine == "plain" if plain is None else plain:
            return [Features(u, None) for u in self.encoder.features(lr)]
        options = self.served
        lr = laid_out(lr.to(options.network_dtype(lr.dtype)), options.memory_format)
        with without_autocast(lr.device.type):
            pyramid, stacked = self.encoder.pyramid(lr, options.method)
        return [Features(own, stacked) for own in pyramid]

    def encode_features(
        self, hr: Tensor, features: list[Features], noise: Tensor | None, initialize: bool = False
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The latents of an image of the padded size, and the log|det| (B,) of encoding with the density of all latents but the
        last. Without checks.
        """
        z, latents, logdets = hr, [], []
        plain = initialize or self.engine == "plain"
        for index, level in enumerate(self.levels):
            noise_at = self.noise_at(index, noise, features[index].own, plain)
            if plain:
                z, latent, logdet = level.encode(z, features[index].own, noise_at, initialize, self.options.backend)
            else:
                z, latent, logdet = encode_level(level, z, features[index], noise_at, self.served)
            logdets.append(logdet)
            if latent is not None:
                latents.append(latent)
        return (*latents, z), torch.stack(logdets).sum(dim=0)

    def decode_features(
        self, latents: Sequence[Tensor], features: list[Features], noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """hr of the padded size, and the log|det| (B,) of decoding, which is minus that of encoding. Without checks."""
        *latents, z = latents
        logdets = []
        plain = self.engine == "plain"
        for index in reversed(range(len(self.levels))):
            level, noise_at = self.levels[index], self.noise_at(index, noise, features[index].own, plain)
            latent = latents.pop() if level.split_channels else None
            if plain:
                z, logdet = level.decode(z, latent, features[index].own, noise_at, self.options.backend)
            else:
                z, logdet = level_decoder(level, features[index], noise_at, self.served)(z, latent, None)
            logdets.append(logdet)
        return z, torch.stack(logdets).sum(dim=0)

    def noise_at(self, index: int, noise: Tensor | None, own: Tensor, filled: bool) -> Tensor | None:
        """The noise condition v at the resolution of a level: bicubic, half-pixel centres, no antialiasing.

        None where there is no noise-conditional layer; without noise None, or zeros where they must be `filled` in.
        """
        if not self.config.noise_steps[index] or (noise is None and not filled):
            return None
        size = own.shape[2:]
        if noise is None:
            return own.new_zeros(own.shape[0], self.config.noise_channels, *size)
        if noise.shape[2:] == (1, 1):
            return noise.expand(-1, -1, *size)
        return F.interpolate(noise, size=size, mode="bicubic", align_corners=False)


def _bits(encoded: Encoded, hr: Tensor) -> Tensor:
    """Negative log-likelihood (B,) in bits per position of hr."""
    return encoded.log_likelihood / (-math.log(2) * hr.shape[2] * hr.shape[3])
