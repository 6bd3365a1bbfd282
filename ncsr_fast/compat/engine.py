"""Our model on a published network's parameters, and what it keeps between two calls that record no gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.compat.structure import skeleton_of
from ncsr_fast.compat.weights import StackedWeights, Vessel, state_of
from ncsr_fast.config import NCSRConfig
from ncsr_fast.engine.conditioning import Features
from ncsr_fast.engine.fused_level import Decoder, level_decoder
from ncsr_fast.engine.memory import spare_bytes
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.layout import laid_out
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.precision import convolutions_are_rounded


class Decoders(NamedTuple):
    """What is kept of an LR image for further samples of it."""

    noise: Tensor | None
    of_levels: dict[int, Decoder]


@dataclass
class Image:
    """The last LR image, and what is kept of it."""

    lr: Tensor
    features: list[Features]
    kept: Decoders | None = None


class Engine:
    """Our model with the parameters of a published network, for one call after the other or several at once.

    Where gradients are recorded, parameters are stacked anew in every call, as part of the graph.

    Where they are not, the stacked parameters, what is folded of them, the encoder's features of the last LR image and what
    all samples of it share are kept as long as the parameters have the same memory, count of changes and hash of bits, and
    the image the same pixels, whatever tensor they are in.

    Threads share nothing that a call changes under another's hands: every recorded call fills a model of its own, and what is
    kept is replaced by something new, never changed into it.
    """

    def __init__(self, net: nn.Module, config: NCSRConfig, options: dict[str, Any]) -> None:
        self.skeleton, self._given_options = skeleton_of(config), options
        self.weights = StackedWeights(self.skeleton, net)
        self._idle: list[Vessel] = []  # empty, as many as calls were inside at once
        self._kept: tuple[object, Filled] | None = None  # with the state of its parameters

    @contextlib.contextmanager
    def filled(self, weights: list[Tensor], recorded: bool) -> Iterator[Filled]:
        """The model with these parameters, for use inside."""
        options = self._options(weights[0])
        state = None if recorded else state_of(weights)
        if state is not None:
            yield self._kept_of(weights, options, (state, options))
            return
        self._kept = None  # let go of what was kept
        vessel = self._vessel()
        try:
            vessel.fill(weights)
            yield Filled(vessel.model, options, keeps=False)
        finally:
            vessel.clear()  # the graph keeps what it needs
            self._idle.append(vessel)

    def _kept_of(self, weights: list[Tensor], options: EngineOptions, state: object) -> Filled:
        kept = self._kept
        if kept is None or kept[0] != state:
            kept = self._kept = None  # before the memory is needed again
            vessel = self._vessel()
            vessel.fill(weights)
            for level in vessel.model.levels:
                level.cache.freeze()  # nobody changes its weights
            kept = self._kept = state, Filled(vessel.model, options, keeps=True)
        return kept[1]

    def _vessel(self) -> Vessel:
        try:
            return self._idle.pop()
        except IndexError:
            return Vessel(self.skeleton, self.weights.slots)

    def _options(self, like: Tensor) -> EngineOptions:
        rounded = like.is_cuda and like.dtype == torch.float32 and convolutions_are_rounded("cuda")
        options = EngineOptions(**{"precision": "tf32" if rounded else "fp32", "checkpoint": False, **self._given_options})
        return options.under_autocast(like)


class Filled:
    """Our model with parameters."""

    def __init__(self, model: NCSR, options: EngineOptions, keeps: bool) -> None:
        self.model, self._keeps = model, keeps
        self.model.options = options
        self._image: Image | None = None

    def features(self, lr: Tensor) -> list[Features]:
        """The condition of every level, of an LR image of even size."""
        if not self._keeps:
            return self.model.features(lr)
        image = self._image
        if image is None or not _same(image.lr, lr):
            image = self._image = None  # before the memory is needed again
            image = self._image = Image(lr.clone(), self.model.features(lr))
        return image.features

    def given(self, features: Sequence[Tensor]) -> list[Features]:
        """The same of feature maps that are there."""
        options = self.model.options
        dtype, layout = options.network_dtype(features[0].dtype), options.memory_format
        return [Features(laid_out(own.to(dtype), layout), None) for own in features]

    def encode(self, hr: Tensor, features: list[Features], noise: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Latents in encoding order, and the log-det (B,) with the density of all but the last."""
        return self.model.encode_features(hr, features, noise)

    def decode(self, latents: list[Tensor], features: list[Features], noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image, and the log-det (B,) of decoding, minus that of encoding."""
        *latents, z = latents
        if noise is not None and self._keeps and not noise.any():
            noise = None  # zero
        decoders, logdets = self._decoders(features, noise), []
        for index in reversed(range(len(self.model.levels))):
            latent = latents.pop() if self.model.levels[index].split_channels else None
            z, logdet = self._decoder(index, features[index], noise, decoders)(z, latent, None)
            logdets.append(logdet)
        return z, torch.stack(logdets).sum(dim=0)

    def _decoders(self, features: list[Features], noise: Tensor | None) -> dict[int, Decoder] | None:
        """Those kept of the image under this noise, None where none are kept."""
        image = self._image
        if image is None or features is not image.features or not self._fits(features):
            return None
        kept = image.kept
        if kept is None or not _same(kept.noise, noise):
            kept = image.kept = Decoders(None if noise is None else noise.clone(), {})
        return kept.of_levels

    def _decoder(self, index: int, features: Features, noise: Tensor | None, kept: dict[int, Decoder] | None) -> Decoder:
        if kept is not None and index in kept:
            return kept[index]
        noise = self.model.noise_at(index, noise, features.own, False)
        decoder = level_decoder(self.model.levels[index], features, noise, self.model.options)
        if kept is not None:
            kept[index] = decoder
        return decoder

    def _fits(self, condition: list[Features]) -> bool:
        """Whether what the samples of the image share is little enough to be kept."""
        count = 0
        for level, features in zip(self.model.levels, condition):
            elements = 2 * level.channels + self.model.config.hidden_channels
            count += level.steps * elements * features.own[:, :1].numel() * features.own.element_size()
        return count <= spare_bytes(condition[0].own.device)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two images are the same to the last bit, in the same place; NaN is not. Waits for the device."""
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
