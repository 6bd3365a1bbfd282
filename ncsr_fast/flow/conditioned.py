"""A flow conditioned on LR images: what depends on the images alone is computed once, for any number of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine.condition import Condition
from ncsr_fast.engine.memory import spare_bytes
from ncsr_fast.engine.plain import PlainLevel, Plan, plan
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
        return self.condition.features[0].own.shape[0]

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
        """The plan of a level in one direction; weights are recorded if autograd was on at creation and is on now."""
        recorded = self.recorded and torch.is_grad_enabled()
        if (index, inverse, recorded) in self._plans:
            return self._plans[index, inverse, recorded]
        with torch.set_grad_enabled(recorded):
            made = plan(self.levels[index], self.condition.features[index], self.options, inverse)
        if self.keeps:
            self._plans[index, inverse, recorded] = made
        return made

    def encode(self, x: Tensor, noise: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Latents, and the log|det| (B,) of encoding plus the log-density of all latents but the last."""
        return _encode(x, (partial(self.plan(index, inverse=False).encode, noise=noise) for index in range(len(self.levels))))

    def encoded(self, x: Tensor, noise: Tensor | None) -> Encoded:
        """Latents and log-likelihood."""
        return self._with_prior(*self.encode(x, noise))

    def initialized(self, x: Tensor, noise: Tensor | None) -> Encoded:
        """Latents and log-likelihood by the reference, which sets every actnorm from its input before applying it."""
        plain = (PlainLevel(*pair, self.options) for pair in zip(self.levels, self.condition.features))
        return self._with_prior(*_encode(x, (partial(level.encode, noise=noise, initialize=True) for level in plain)))

    def _with_prior(self, latents: tuple[Tensor, ...], logdet: Tensor) -> Encoded:
        """Latents and log-likelihood, from the log-det plus the log-density of all latents but the last."""
        mean = self.condition.prior_mean
        top = latents[-1] if mean is None else latents[-1] - mean
        return Encoded(latents, logdet + gaussian_log_density(top).sum(dim=(1, 2, 3)), mean)

    def decode(
        self, latents: Sequence[Tensor], noise: Tensor | None, peaks: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The image of latents, and the log|det| (B,) of decoding, which is the negative of that of encoding.

        Args:
            latents: In encoding order; of any number of samples if the condition is of one image.
            noise: The noise condition, or None for zero.
            peaks: An output list. If given, the largest magnitude (B,) of the state after each decoded step is appended to it
                (NaN if the state contains NaN).
        """
        z, logdets = latents[-1], []
        for index, _, latent in downward(self.levels, latents):
            z, logdet = self._decode_level(index, z, latent, noise, peaks)
            logdets.append(logdet)
        return z, torch.stack(logdets).sum(dim=0)

    def _decode_level(
        self, index: int, z: Tensor, latent: Tensor | None, noise: Tensor | None, peaks: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Decode one level; samples that share an image are decoded in groups that fit the memory."""
        planned = self.plan(index, inverse=True)
        if traced() or self.batch != 1 or z.shape[0] <= (together := self._samples_at_once(index)):
            return planned.decode(z, latent, noise, peaks)  # graphs have no chunks
        parts, logdets = [], []
        found: list[list[Tensor]] = []
        for first in range(0, z.shape[0], together):
            chunk = slice(first, first + together)
            found.append([])
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

    def _samples_at_once(self, index: int) -> int:
        """The number of samples of an image that a level decodes together."""
        if self.options.samples_at_once is not None:
            return self.options.samples_at_once
        own = self.condition.features[index].own
        channels = 2 * self.config.hidden_channels + 8 * self.levels[index].channels  # hidden layers, outputs and states
        return max(1, spare_bytes(own.device) // (channels * own.shape[2] * own.shape[3] * own.element_size()))

    def _fit(self) -> bool:
        """True if the plans are small enough to be cached."""
        count = 0
        for level, features in zip(self.levels, self.condition.features):
            elements = 2 * level.channels + self.config.hidden_channels
            count += level.steps * elements * features.own[:, :1].numel() * features.own.element_size()
        return count <= spare_bytes(self.condition.features[0].own.device)


def _encode(x: Tensor, levels: Iterable[Callable[[Tensor], EncodedLevel]]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The latents of the levels in encoding order, each level a function of the state, and the sum (B,) of their log-dets."""
    latents, logdets = [], []
    for encode in levels:
        x, latent, logdet = encode(x)
        logdets.append(logdet)
        if latent is not None:
            latents.append(latent)
    return (*latents, x), torch.stack(logdets).sum(dim=0)
