"""A flow conditioned on LR images: what depends on the images alone is computed once, for any number of calls."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine.condition import Condition
from ncsr_fast.engine.memory import spare_bytes
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.engine.plain import PlainLevel, Plan, plan
from ncsr_fast.flow.level_memory import plan_bytes, walk_bytes
from ncsr_fast.flow.walk import downward
from ncsr_fast.layout import traced
from ncsr_fast.ops.reference import gaussian_log_density

if TYPE_CHECKING:
    from ncsr_fast.config import FlowConfig
    from ncsr_fast.engine.options import EngineOptions
    from ncsr_fast.flow.level import FlowLevel

EncodedLevel = tuple[Tensor, Tensor | None, Tensor]  # state of the next level, latent of the split, log-det


class Encoded(NamedTuple):
    """The latents of an image, and its log-likelihood.

    Args:
        latents: The latents of the splits in encoding order, then the top latent.
        log_likelihood: log p(hr | lr) = Σ log|det| + Σ log N(latent; mean, 1), (B,) in nats.
        prior_mean: Mean of the top latent, of its shape; None where it is zero. The mean of all other latents is zero.
    """

    latents: tuple[Tensor, ...]
    log_likelihood: Tensor
    prior_mean: Tensor | None = None


class Levels:
    """The levels of a flow for one condition. Arguments are not checked: images are of the padded size.

    Args:
        levels: The levels, from the HR side.
        config: The flow.
        condition: The condition of a batch of LR images, or of one image that all samples share.
        options: Options of the engine.
        keeps: True: plans of the levels are cached for further calls. False: every call makes them.
    """

    def __init__(
        self, levels: Sequence[FlowLevel], config: FlowConfig, condition: Condition, options: EngineOptions, keeps: bool
    ) -> None:
        self.levels, self.config, self.condition, self.options = levels, config, condition, options
        self.keeps = keeps and self._fit()
        self.recorded = torch.is_grad_enabled()  # gradients of the encoder, of lr and of the weights
        self._plans: dict[tuple[int, bool, bool], Plan] = {}
        self._images: list[Levels] | None = None

    @property
    def batch(self) -> int:
        """The number of LR images."""
        return self.condition.features[0].batch

    @property
    def records(self) -> bool:
        """True where decoding now would record gradients of the weights or of the features."""
        if not (self.recorded and torch.is_grad_enabled()):
            return False
        features = (tensor for each in self.condition.features for tensor in each if isinstance(tensor, Tensor))
        weights = (weight for level in self.levels for weight in level.parameters())
        return any(tensor.requires_grad for tensor in itertools.chain(weights, features))

    def image(self, index: int) -> Levels:
        """The levels for one of the LR images."""
        if self.batch == 1:
            return self
        if self._images is None:
            with torch.set_grad_enabled(self.recorded):
                parts = (self.condition.sample(number) for number in range(self.batch))
                self._images = [Levels(self.levels, self.config, part, self.options, self.keeps) for part in parts]
        return self._images[index]

    def plan(self, index: int, inverse: bool) -> Plan:
        """The plan of a level in one direction; it records gradients of weights if they are recorded now and were before."""
        recorded = self.recorded and torch.is_grad_enabled()
        if (index, inverse, recorded) in self._plans:
            return self._plans[index, inverse, recorded]
        with torch.set_grad_enabled(recorded):
            made = plan(self.levels[index], self.condition.features[index].whole, self.options, inverse)
        if self.keeps:
            self._plans[index, inverse, recorded] = made
        return made

    def encode(self, x: Tensor, noise: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Latents, and the log|det| (B,) of encoding plus the log-density of all latents but the last."""
        return _encode(x, (partial(self.plan(index, inverse=False).encode, noise=noise) for index in range(len(self.levels))))

    def encoded(self, x: Tensor, noise: Tensor | None, mean: Tensor | None) -> Encoded:
        """Latents and log-likelihood, with that mean of the prior of the top latent; None is zero."""
        return with_prior(*self.encode(x, noise), mean)

    def initialized(self, x: Tensor, noise: Tensor | None) -> Encoded:
        """Latents and log-likelihood by the reference, which sets every actnorm from its input before applying it."""
        pairs = zip(self.levels, self.condition.features)
        plain = (PlainLevel(level, features.whole, self.options) for level, features in pairs)
        latents, logdet = _encode(x, (partial(level.encode, noise=noise, initialize=True) for level in plain))
        return with_prior(latents, logdet, self.condition.prior_mean)

    def region_plan(self, index: int, rows: slice, columns: slice, inverse: bool = True) -> Plan:
        """The plan of decoding a part of a level, or of encoding it, for one call."""
        with torch.set_grad_enabled(self.recorded and torch.is_grad_enabled()):
            return plan(self.levels[index], self.condition.features[index].region(rows, columns), self.options, inverse)

    def decode(self, latents: Sequence[Tensor], noise: Tensor | None, peaks: Peaks | None = None) -> tuple[Tensor, Tensor]:
        """The image of latents, and the log|det| (B,) of decoding, which is minus that of encoding.

        Args:
            latents: In encoding order; of several samples where the condition is one image's.
            noise: As the model has it, or None for zero.
            peaks: Are added those of the state after each step decoded.
        """
        z, logdets = latents[-1], []
        for index, _, latent in downward(self.levels, latents):
            z, logdet = self.decode_level(index, self.plan(index, inverse=True), z, latent, noise, peaks)
            logdets.append(logdet)
        return z, torch.stack(logdets).sum(dim=0)

    def decode_level(
        self, index: int, planned: Plan, z: Tensor, latent: Tensor | None, noise: Tensor | None, peaks: Peaks | None
    ) -> tuple[Tensor, Tensor]:
        """One level, or a part of it, of as many samples at a time as the memory holds where they share an image."""
        if traced() or self.batch != 1 or z.shape[0] <= (together := self.samples_at_once(index, z.shape[2] * z.shape[3])):
            return planned.decode(z, latent, noise, peaks)  # graphs have no chunks
        parts, logdets = [], []
        found: list[Peaks] = []
        for first in range(0, z.shape[0], together):
            chunk = slice(first, first + together)
            found.append(Peaks() if peaks is None else Peaks(*peaks.window))
            own_noise = noise if noise is None or len(noise) == 1 else noise[chunk]
            x, logdet = planned.decode(z[chunk], None if latent is None else latent[chunk], own_noise, found[-1])
            parts.append(x)
            logdets.append(logdet)
        if peaks is not None:
            peaks += [torch.cat(peak) for peak in zip(*found)]
        return torch.cat(parts), torch.cat(logdets)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which weights do not change: values computed from them are computed or compared only once."""
        with contextlib.ExitStack() as stack:
            for level in self.levels:
                stack.enter_context(level.cache.held())
            yield

    def walk_bytes(self, index: int) -> int:
        """Bytes a pixel of a level, of one sample, that evaluating it takes."""
        return walk_bytes(self.levels[index], self.config, self._element_size)

    def plan_bytes(self, index: int) -> int:
        """Bytes a pixel of a level that the plan of decoding it stores."""
        return plan_bytes(self.levels[index], self.config, self._element_size)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.levels[0].actnorm_bias.device

    @property
    def _element_size(self) -> int:
        return self.options.network_dtype(self.levels[0].actnorm_bias.dtype).itemsize

    def samples_at_once(self, index: int, pixels: int) -> int:
        """How many samples of an image a level of so many pixels decodes together."""
        if self.options.samples_at_once is not None:
            return self.options.samples_at_once
        return max(1, spare_bytes(self.device) // (self.walk_bytes(index) * pixels))

    def _fit(self) -> bool:
        """True if the plans are small enough to be cached."""
        parts = [self.plan_bytes(index) * math.prod(each.size) for index, each in enumerate(self.condition.features)]
        return self.batch * sum(parts) <= spare_bytes(self.device)


def with_prior(latents: tuple[Tensor, ...], logdet: Tensor, mean: Tensor | None) -> Encoded:
    """Latents with their log-likelihood, from the log-det with the log-density of all of them but the last."""
    top = latents[-1] if mean is None else latents[-1] - mean
    return Encoded(latents, logdet + gaussian_log_density(top).sum(dim=(1, 2, 3)), mean)


def _encode(x: Tensor, levels: Iterable[Callable[[Tensor], EncodedLevel]]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The latents of the levels in encoding order, each level a function of the state, and the sum (B,) of their log-dets."""
    latents, logdets = [], []
    for encode in levels:
        x, latent, logdet = encode(x)
        logdets.append(logdet)
        if latent is not None:
            latents.append(latent)
    return (*latents, x), torch.stack(logdets).sum(dim=0)
