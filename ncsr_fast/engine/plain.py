"""The reference of the plan: a level evaluated step by step; also used for networks without kernels."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ncsr_fast.engine.condition import Features, resized_noise
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.engine.plan import Level, LevelPlan, Window


class ReferenceLevel(Level, Protocol):
    """Interface of a level with a reference, such as `ncsr_fast.flow.level.FlowLevel`."""

    noise_channels: int
    has_kernels: bool

    def encode(
        self, z: Tensor, u: Tensor, v: Tensor | None, initialize: bool, backend: str, window: Window | None
    ) -> tuple[Tensor, Tensor | None, Tensor]: ...

    def decode(
        self, z: Tensor, latent: Tensor | None, u: Tensor, v: Tensor | None, backend: str, peaks: Peaks | None
    ) -> tuple[Tensor, Tensor]: ...


class PlainLevel:
    """A plan with the interface of `LevelPlan`, evaluated by the level's reference.

    Args:
        level: The level.
        features: The level's condition.
        options: Options of the engine, of which only the operators' backend is used.
    """

    def __init__(self, level: ReferenceLevel, features: Features, options: EngineOptions) -> None:
        self.level, self.backend = level, options.backend
        self.u = features.joined.to(level.actnorm_bias.dtype)

    def encode(
        self, z: Tensor, noise: Tensor | None = None, window: Window | None = None, initialize: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode as `LevelPlan.encode`; `initialize` sets every actnorm from its input before applying it."""
        return self.level.encode(z, self._u(z), self.noise(noise, z), initialize, self.backend, window)

    def decode(
        self, z: Tensor, latent: Tensor | None, noise: Tensor | None = None, peaks: Peaks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode as `LevelPlan.decode`."""
        return self.level.decode(z, latent, self._u(z), self.noise(noise, z), self.backend, peaks)

    def noise(self, noise: Tensor | None, z: Tensor) -> Tensor | None:
        """The noise condition v of the level, zeros if noise is None; None for a level without noise couplings."""
        if not any(branch.condition == "noise" for branch in self.level.branches):
            return None
        if noise is None:
            return self.u.new_zeros(z.shape[0], self.level.noise_channels, *self.u.shape[2:])
        return resized_noise(noise, self.u.shape[2:])

    def _u(self, z: Tensor) -> Tensor:
        """The features, shared by all samples of z."""
        return self.u.expand(z.shape[0], -1, -1, -1)


Plan = LevelPlan | PlainLevel


def plan(level: ReferenceLevel, features: Features, options: EngineOptions, inverse: bool) -> Plan:
    """The plan of a level, or its reference if the options or the kind of its networks require it."""
    if options.engine == "plain" or not level.has_kernels:
        return PlainLevel(level, features, options)
    return LevelPlan(level, features, options, inverse)
