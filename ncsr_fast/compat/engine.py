"""The model of this package on a published network's parameters, with a cache for calls that record no gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.compat.structure import skeleton_of
from ncsr_fast.compat.weights import StackedWeights, Vessel, state_of
from ncsr_fast.config import NCSRConfig
from ncsr_fast.encoder.low_light import squeezed
from ncsr_fast.engine.condition import Condition, Features
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.flow.conditioned import Levels
from ncsr_fast.layout import laid_out
from ncsr_fast.model import NCSR
from ncsr_fast.precision import convolutions_are_rounded


class Image(NamedTuple):
    """The last LR image, and the levels conditioned on it."""

    lr: Tensor
    levels: Levels


class Engine:
    """An NCSR model with the parameters of a published network, for several calls at once.

    If gradients are recorded, parameters are stacked in every call, as part of the graph.

    If not, the stacked parameters, the constants folded from them, the encoder's features of the last LR image and the values
    that its samples share are cached. They are used again as long as the parameters have the same memory, count of changes
    and hash of bits, and the image has the same pixels, in whatever tensor.

    Calls may run in several threads: every recorded call fills its own model, and cached values are replaced by new ones,
    never changed.
    """

    def __init__(self, net: nn.Module, config: NCSRConfig, options: dict[str, Any]) -> None:
        self.skeleton, self._given_options = skeleton_of(config), options
        self.weights = StackedWeights(self.skeleton, net)
        self._idle: list[Vessel] = []  # empty vessels, as many as there were simultaneous calls
        self._cached: tuple[object, Filled] | None = None  # with the state of its parameters

    @contextlib.contextmanager
    def filled(self, weights: list[Tensor], recorded: bool) -> Iterator[Filled]:
        """A context with the model with these parameters."""
        options = self._options(weights[0])
        state = None if recorded else state_of(weights)
        if state is not None:
            yield self._cached_model(weights, options, (state, options))
            return
        self._cached = None  # free the cached model
        vessel = self._vessel()
        try:
            vessel.fill(weights)
            yield Filled(vessel.model, options, keeps=False)
        finally:
            vessel.clear()  # the graph has references to what it needs
            self._idle.append(vessel)

    def _cached_model(self, weights: list[Tensor], options: EngineOptions, state: object) -> Filled:
        cached = self._cached
        if cached is None or cached[0] != state:
            cached = self._cached = None  # before the memory is needed again
            vessel = self._vessel()
            vessel.fill(weights)
            for level in vessel.model.levels:
                level.cache.freeze()  # its weights are never changed
            cached = self._cached = state, Filled(vessel.model, options, keeps=True)
        return cached[1]

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
    """An NCSR model with parameters."""

    def __init__(self, model: NCSR, options: EngineOptions, keeps: bool) -> None:
        self.model, self._keeps = model, keeps
        self.model.options = options
        self._image: Image | None = None

    def condition(self, lr: Tensor) -> Levels:
        """The levels conditioned on LR images with even sides."""
        if not self._keeps:
            return self.model.conditioned_levels(lr)
        image = self._image
        if image is None or not _same(image.lr, lr):
            image = self._image = None  # before the memory is needed again
            image = self._image = Image(lr.clone(), self.model.conditioned_levels(lr, keeps=True))
        return image.levels

    def given(self, features: Sequence[Tensor], color_map: Tensor | None = None) -> Levels:
        """The levels conditioned on given feature maps, and the mean of the prior from a given colour map (LLFlow)."""
        model, options = self.model, self.model.options
        dtype = model.inputs.like.dtype
        network_dtype, layout = options.network_dtype(dtype), options.memory_format
        mean = None if color_map is None or model.flow.prior == "standard" else squeezed(color_map)
        condition = Condition([Features(laid_out(own.to(network_dtype), layout)) for own in features], mean)
        return Levels(model.levels, model.flow, condition.with_mean_in(dtype), options, keeps=False)

    def decode(self, latents: list[Tensor], levels: Levels, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image, and the log-det (B,) of decoding, which is the negative of that of encoding."""
        if noise is not None and self._keeps and not noise.any():
            noise = None  # zero
        return levels.decode(latents, noise)


def _same(first: Tensor, second: Tensor) -> bool:
    """True if two images on the same device have the same bits, and no NaN; waits for the device."""
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
