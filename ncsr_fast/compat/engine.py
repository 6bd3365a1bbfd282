"""Our model on a published network's parameters, and what it keeps between two calls that record no gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.compat.structure import skeleton_of
from ncsr_fast.compat.weights import StackedWeights, Vessel, state_of
from ncsr_fast.config import NCSRConfig
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

    def condition(self, lr: Tensor) -> Levels:
        """The levels conditioned on LR images of an even size."""
        if not self._keeps:
            return self.model.conditioned_levels(lr)
        image = self._image
        if image is None or not _same(image.lr, lr):
            image = self._image = None  # before the memory is needed again
            image = self._image = Image(lr.clone(), self.model.conditioned_levels(lr, keeps=True))
        return image.levels

    def given(self, features: Sequence[Tensor]) -> Levels:
        """The levels conditioned on feature maps that are there."""
        model, options = self.model, self.model.options
        dtype, layout = options.network_dtype(features[0].dtype), options.memory_format
        condition = Condition([Features(laid_out(own.to(dtype), layout)) for own in features])
        return Levels(model.levels, model.flow, condition, options, keeps=False)

    def decode(self, latents: list[Tensor], levels: Levels, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image, and the log-det (B,) of decoding, minus that of encoding."""
        if noise is not None and self._keeps and not noise.any():
            noise = None  # zero
        return levels.decode(latents, noise)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two images are the same to the last bit, in the same place; NaN is not. Waits for the device."""
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
