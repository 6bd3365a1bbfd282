"""Our model on a published network's parameters, and what it keeps between two calls that record no gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.compat.structure import skeleton_of
from ncsr_fast.compat.weights import StackedWeights, state_of
from ncsr_fast.config import NCSRConfig
from ncsr_fast.engine.conditioning import Features
from ncsr_fast.engine.fused_level import Decoder, level_decoder
from ncsr_fast.engine.memory import spare_bytes
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.layout import laid_out
from ncsr_fast.precision import convolutions_are_rounded


class Condition(NamedTuple):
    """What an LR image decides."""

    features: list[Features]
    decoders: dict[object, Decoder]  # of the levels, where they are kept


class Engine:
    """Where gradients are recorded, parameters are stacked anew in every call, as part of the graph.

    Where they are not, the stacked parameters, what is folded of them, the encoder's features of the last LR image and what
    all samples of it share are kept as long as the parameters have the same memory, count of changes and sum of bits, and
    the image the same pixels, whatever tensor they are in.
    """

    def __init__(self, net: nn.Module, config: NCSRConfig, options: dict[str, Any]) -> None:
        self.model, self._given_options = copy.deepcopy(skeleton_of(config)), options
        self.weights = StackedWeights(self.model, net)
        self._state: object | None = None  # of the parameters that the model is filled with
        self._image: tuple[Tensor, Condition] | None = None
        self._noise: Tensor | None = None  # that the decoders are of
        self._keeping = False

    @contextlib.contextmanager
    def filled(self, weights: list[Tensor], recorded: bool) -> Iterator[None]:
        """Inside, the model has these parameters."""
        options = self._options(weights[0])
        if recorded:
            self.forget()
            self.model.options = options
            self.weights.fill(weights)
            try:
                yield
            finally:
                self.weights.clear()  # the graph keeps what it needs
            return
        state = state_of(weights)
        if state is None or (state, options) != self._state:
            self.forget()
            self.model.options = options
            self.weights.fill(weights)
            for level in self.model.levels:
                level.cache.freeze()  # nobody else changes them
            self._state = state, options
        self._keeping = state is not None
        try:
            yield
        finally:
            self._keeping = False

    def forget(self) -> None:
        """Let go of what was kept."""
        self._state, self._image, self._noise = None, None, None
        self.weights.clear()
        for level in self.model.levels:
            level.cache.thaw()

    def _options(self, like: Tensor) -> EngineOptions:
        rounded = like.is_cuda and like.dtype == torch.float32 and convolutions_are_rounded("cuda")
        options = EngineOptions(**{"precision": "tf32" if rounded else "fp32", "checkpoint": False, **self._given_options})
        return options.under_autocast(like)

    def features(self, lr: Tensor) -> Condition:
        """Of an LR image of even size."""
        if not self._keeping:
            return Condition(self.model.features(lr), {})
        if self._image is None or not _same(self._image[0], lr):
            self._image = None  # before its memory is needed again
            self._image = lr.clone(), Condition(self.model.features(lr), {})
        return self._image[1]

    def given(self, features: Sequence[Tensor]) -> Condition:
        """The same of feature maps that are there."""
        options = self.model.options
        dtype, layout = options.network_dtype(features[0].dtype), options.memory_format
        return Condition([Features(laid_out(own.to(dtype), layout), None) for own in features], {})

    def encode(self, hr: Tensor, condition: Condition, noise: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Latents in encoding order, and the log-det (B,) with the density of all but the last."""
        return self.model.encode_features(hr, condition.features, noise)

    def decode(self, latents: list[Tensor], condition: Condition, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image, and the log-det (B,) of decoding, minus that of encoding."""
        *latents, z = latents
        if noise is not None and self._keeping and not noise.any():
            noise = None  # zero
        decoders, logdets = self._decoders(condition, noise), []
        for index in reversed(range(len(self.model.levels))):
            latent = latents.pop() if self.model.levels[index].split_channels else None
            z, logdet = self._decoder(index, condition, noise, decoders)(z, latent, None)
            logdets.append(logdet)
        return z, torch.stack(logdets).sum(dim=0)

    def _decoders(self, condition: Condition, noise: Tensor | None) -> dict[object, Decoder] | None:
        """Those kept of the image under this noise, None where none are kept."""
        if not self._keeping or self._image is None or condition is not self._image[1] or not self._fits(condition):
            return None
        if not _same(self._noise, noise):
            condition.decoders.clear()
            self._noise = None if noise is None else noise.clone()
        return condition.decoders

    def _decoder(self, index: int, condition: Condition, noise: Tensor | None, kept: dict[object, Decoder] | None) -> Decoder:
        if kept is not None and index in kept:
            return kept[index]
        level, features = self.model.levels[index], condition.features[index]
        decoder = level_decoder(level, features, self.model.noise_at(index, noise, features.own, False), self.model.options)
        if kept is not None:
            kept[index] = decoder
        return decoder

    def _fits(self, condition: Condition) -> bool:
        """Whether what the samples of the image share is little enough to be kept."""
        count = 0
        for level, features in zip(self.model.levels, condition.features):
            of_step = 2 * level.channels + self.model.config.hidden_channels
            count += level.steps * of_step * features.own[:, :1].numel() * features.own.element_size()
        return count <= spare_bytes(condition.features[0].own.device)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two images are the same to the last bit, in the same place; NaN is not. Waits for the device."""
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
