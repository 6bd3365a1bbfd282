"""A flow described by data: everything needed to build a model, except its weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncsr_fast.checks import check_temperature
from ncsr_fast.published_options import architecture
from ncsr_fast.systems import PRESETS, SYSTEMS, System

CONDITIONS = ("features", "noise", None)


@dataclass(frozen=True)
class Branch:
    """An affine map `(z + shift) · scale` of a conditional step, whose shift and scale a network computes.

    Args:
        name: The attribute of the level that holds the networks of all its steps, and their name in state dicts.
        condition: The condition of the networks: "features", the encoder's features; "noise", the noise at the level's
            resolution; or None.
        changes_all: True: every channel is changed, and the network reads the condition alone (SRFlow's injector). False: the
            second half of the channels is changed, and the network reads the first half too (a coupling).
        steps: Number of the level's last steps that have the branch; None: all steps.
        network: The kind of networks, a name in `ncsr_fast.flow.networks.NETWORKS`.
    """

    name: str
    condition: str | None = "features"
    changes_all: bool = False
    steps: int | None = None
    network: str = "glow"

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a branch's name must be an identifier, not {self.name!r}")
        if self.condition not in CONDITIONS:
            raise ValueError(f"branch {self.name}: condition must be one of {CONDITIONS}, not {self.condition!r}")
        if self.changes_all and self.condition is None:
            raise ValueError(f"branch {self.name} changes all channels and has no condition: its network would read nothing")

    @property
    def label(self) -> str:
        """The branch of one step in words, such as "noise coupling" for noise_couplings."""
        return self.name.replace("_", " ").removesuffix("s")


INJECTORS, COUPLINGS = Branch("injectors", changes_all=True), Branch("couplings")


@dataclass(frozen=True)
class LevelConfig:
    """A level of a flow: squeeze, transition steps, conditional steps, split.

    Args:
        steps: Conditional steps: actnorm, 1×1 convolution, branches.
        condition_channels: Channels of the features u.
        branches: The branches of a conditional step, in the order in which encoding applies them.
        transition_steps: Steps of actnorm and 1×1 convolution alone, before the conditional steps.
        split_channels: Number of channels that leave the flow as a latent after the last step; 0: no split.
        squeeze: Side of the blocks of pixels that become channels before the first step; 1: no squeeze.
    """

    steps: int
    condition_channels: int
    branches: tuple[Branch, ...] = (INJECTORS, COUPLINGS)
    transition_steps: int = 0
    split_channels: int = 0
    squeeze: int = 2

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("condition_channels", 0),
            ("transition_steps", 0),
            ("split_channels", 0),
            ("squeeze", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} of a level must be an integer ≥ {least}, not {value!r}")
        counts = ((branch, self.steps if branch.steps is None else min(branch.steps, self.steps)) for branch in self.branches)
        # a branch with 0 steps is left out, and a branch with more steps than there are has all steps
        object.__setattr__(self, "branches", tuple(dataclasses.replace(b, steps=count) for b, count in counts if count > 0))
        names = [branch.name for branch in self.branches]
        if len(set(names)) != len(names):
            raise ValueError(f"the branches of a level need names of their own: {', '.join(names)}")


@dataclass(frozen=True)
class FlowConfig:
    """A conditional flow: its levels, prior and base.

    Args:
        scale: Ratio of the sides of the HR image to those of the LR image.
        levels: The levels, from the HR side.
        channels: Channels of an image.
        hidden_channels: Width of the networks.
        noise_channels: Channels of the noise condition: 0 for none, as many as the image's, or 1 for its standard deviation.
        eps: Lower bound of a branch's scale.
        prior: Prior of the top latent: "standard", N(0, 1); "encoder", N(mean, 1) with the encoder's `Condition.prior_mean`.
        base: Image that the flow's images are residuals of, added to samples: None, or "bicubic", the LR image upsampled by
            bicubic interpolation (half-pixel centres, a = -0.75, as `torch.nn.functional.interpolate` has it).
        lr_multiple: LR images are padded so that their sides are multiples of this number.
        lr_channels: Of an LR image.
    """

    scale: int
    levels: tuple[LevelConfig, ...]
    channels: int = 3
    hidden_channels: int = 64
    noise_channels: int = 0
    eps: float = 1e-4
    prior: str = "standard"
    base: str | None = None
    lr_multiple: int = 2
    lr_channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for name, allowed in (("prior", ("standard", "encoder")), ("base", (None, "bicubic"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if not self.levels:
            raise ValueError("a flow needs a level")
        if self.base is not None and self.lr_channels != self.channels:
            raise ValueError(
                f"base={self.base!r} is an LR image enlarged, which has {self.lr_channels} channels, not {self.channels}"
            )
        if not self.noise_channels and any(branch.condition == "noise" for level in self.levels for branch in level.branches):
            raise ValueError("a branch is conditioned on the noise, but noise_channels is 0")
        if self.levels[-1].split_channels:
            raise ValueError("the last level needs no split: its state is the top latent")
        squeeze, sides = math.prod(level.squeeze for level in self.levels), self.scale * self.lr_multiple
        if sides % squeeze:
            raise ValueError(f"the levels squeeze by {squeeze}, but sides of HR are multiples of scale · lr_multiple = {sides}")
        for index, (level, channels) in enumerate(zip(self.levels, self.level_channels())):
            if level.split_channels >= channels:
                raise ValueError(f"level {index + 1} has {channels} channels, but its split takes {level.split_channels}")

    def level_channels(self) -> list[int]:
        """Channels C of the state inside each level, from the HR side."""
        channels, inside = self.channels, []
        for level in self.levels:
            channels *= level.squeeze**2
            inside.append(channels)
            channels -= level.split_channels
        return inside

    def level_scales(self) -> tuple[float, ...]:
        """Sides of each level over those of the LR image, from the HR side."""
        squeezes = itertools.accumulate((level.squeeze for level in self.levels), operator.mul)
        return tuple(self.scale / squeeze for squeeze in squeezes)

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """The shape (C, h, w) of each latent for an LR image of this size: splits in encoding order, then the top latent."""
        sides = [-(-side // self.lr_multiple) * self.lr_multiple * self.scale for side in (height, width)]
        shapes = []
        for index, (level, channels) in enumerate(zip(self.levels, self.level_channels())):
            sides = [side // level.squeeze for side in sides]
            taken = channels if index == len(self.levels) - 1 else level.split_channels
            if taken:
                shapes.append((taken, sides[0], sides[1]))
        return shapes


@dataclass(frozen=True)
class NCSRConfig:
    """Architecture of a model of a published system: NCSR, SRFlow, FS-NCSR, SRFlow-DA and its variants, LLFlow, CTFlow.

    The defaults are the published SRFlow ×4. Levels are counted from the HR side. `ncsr_fast.systems.SYSTEMS` says what the
    models of a system have in common.

    Args:
        scale: Super-resolution factor: 4 or 8; of CTFlow and LLFlow 1.
        channels: Width of the encoder (`nf` of the published options).
        growth: Channels that each convolution of a dense block adds (`gc`).
        blocks: Number of residual-in-residual dense blocks of the encoder (`nb`).
        stacked_blocks: Indices of the blocks whose outputs condition the flow.
        steps: Conditional steps of each level (`K`); of SRFlow-DA-S, of all levels together.
        transition_steps: Unconditional steps (actnorm and 1×1 convolution) that follow each squeeze.
        hidden_channels: Width of the injector and coupling networks.
        noise_channels: 0: not conditioned on noise (SRFlow); 3: conditioned on the noise image (NCSR); 1: conditioned on the
            standard deviation of the noise.
        noise_steps: For each level, the number of its last steps that have a noise coupling (`S`); zero for all levels with
            noise_channels > 0 is NCSR "without the layer".
        eps: Lower bound of the scale of a coupling or an injector.
        system: A name in `SYSTEMS`; "ncsr" without noise_channels is SRFlow.
        temperature: Recommended for samples of the weights, the default of `ncsr-fast sample`; None: the system's.
    """

    scale: int = 4
    channels: int = 64
    growth: int = 32
    blocks: int = 23
    stacked_blocks: tuple[int, ...] = (1, 8, 15, 22)
    steps: int = 16
    transition_steps: int = 2
    hidden_channels: int = 64
    noise_channels: int = 0
    noise_steps: tuple[int, ...] = ()
    eps: float = 1e-4
    system: str = "ncsr"
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"system must be one of {', '.join(map(repr, SYSTEMS))}, not {self.system!r}")
        object.__setattr__(self, "temperature", self.traits.temperature if self.temperature is None else self.temperature)
        check_temperature(self.temperature)
        if self.scale not in self.traits.scales:
            raise ValueError(f"scale must be {' or '.join(map(str, self.traits.scales))}, not {self.scale!r}")
        for name in ("channels", "growth", "blocks", "steps", "hidden_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if not isinstance(self.transition_steps, int) or self.transition_steps < 0:
            raise ValueError(f"transition_steps must be an integer ≥ 0, not {self.transition_steps!r}")
        period = self.traits.split_period
        if period and self.steps % period == 1:
            raise ValueError(
                f"steps must not be {self.steps}: {self.traits.title} splits after steps 0, {period} …, and the last has none"
            )
        object.__setattr__(self, "stacked_blocks", tuple(self.stacked_blocks))
        if len(set(self.stacked_blocks)) != len(self.stacked_blocks) or any(
            not 0 <= index < self.blocks for index in self.stacked_blocks
        ):
            raise ValueError(
                f"stacked_blocks must be distinct block indices below blocks={self.blocks}, not {self.stacked_blocks}"
            )
        self._check_noise()

    def _check_noise(self) -> None:
        object.__setattr__(self, "noise_steps", tuple(self.noise_steps) or (0,) * self.levels)
        if self.noise_channels not in (0, 1, 3):
            raise ValueError(
                f"noise_channels must be 0 (SRFlow), 1 (standard deviation) or 3 (noise), not {self.noise_channels!r}"
            )
        if self.noise_channels and not self.traits.noise:
            raise ValueError(f"noise_channels must be 0: {self.traits.title} has no noise-conditional layer")
        if len(self.noise_steps) != self.levels:
            raise ValueError(f"noise_steps must have one entry for each of the {self.levels} levels: {self.noise_steps}")
        if any(count < 0 for count in self.noise_steps):
            raise ValueError(f"noise_steps must not be negative: {self.noise_steps}")
        if self.noise_channels == 0 and any(self.noise_steps):
            raise ValueError(f"noise_steps={self.noise_steps} needs noise_channels 1 or 3")
        # the published rule "noise_steps >= K - k" lets a level ask for more steps than it has
        object.__setattr__(self, "noise_steps", tuple(min(count, self.steps) for count in self.noise_steps))

    @property
    def traits(self) -> System:
        """What the models of the system have in common."""
        return SYSTEMS[self.system]

    @property
    def levels(self) -> int:
        """Number of flow levels: of NCSR log2(scale) + 1, so that the last one works at half the LR size."""
        return len(self._level_sizes())

    @property
    def condition_channels(self) -> int:
        """Channels of the conditioning features u of every level."""
        return self.channels * (1 + len(self.stacked_blocks))

    def level_channels(self) -> list[int]:
        """Channels C of the state inside each level, from the HR side (×4: 12, 24, 96)."""
        return self.flow.level_channels()

    def _level_sizes(self) -> list[tuple[int, int, bool]]:
        """Of every level the squeeze, the number of conditional steps, and True where a split closes it."""
        traits = self.traits
        if traits.split_period is None:
            count = traits.levels(self.scale)
            return [(2, self.steps, index < count - traits.unsplit_levels) for index in range(count)]
        ends = [*range(1, self.steps, traits.split_period), self.steps]  # splits are behind steps 0, n, 2n …
        counts = [end - start for start, end in zip([0, *ends], ends)]
        return [(1 if index else self.scale, count, index < len(counts) - 1) for index, count in enumerate(counts)]

    @property
    def flow(self) -> FlowConfig:
        """The `FlowConfig` of this architecture."""
        traits, levels, channels = self.traits, [], self.traits.channels
        for (squeeze, steps, is_split), noise_steps in zip(self._level_sizes(), self.noise_steps):
            noise = Branch("noise_couplings", "noise", steps=noise_steps, network=traits.networks)
            branches = tuple(dataclasses.replace(branch, network=traits.networks) for branch in (INJECTORS, noise, COUPLINGS))
            transitions = self.transition_steps if squeeze > 1 else 0
            channels *= squeeze**2
            split = round(channels * 0.5) if is_split else 0
            levels.append(LevelConfig(steps, self.condition_channels, branches, transitions, split, squeeze))
            channels -= split
        return FlowConfig(
            self.scale,
            tuple(levels),
            traits.channels,
            self.hidden_channels,
            self.noise_channels,
            self.eps,
            prior="encoder" if traits.encoder == "low light" else "standard",
            base=traits.base,
            lr_multiple=traits.lr_multiple,
            lr_channels=traits.lr_channels,
        )

    @classmethod
    def preset(cls, name: str) -> NCSRConfig:
        """The configuration called `name`: "ncsr-x4", "srflow-da-x8", "llflow-lol" … (`ncsr_fast.systems.PRESETS`)."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NCSRConfig:
        """The inverse of `to_dict`; an unknown key raises."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration key {', '.join(sorted(map(repr, unknown)))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_published(cls, options: Mapping[str, Any]) -> NCSRConfig:
        """The configuration of a published YAML, given as the dict a YAML reader returns.

        Reads `model`, `scale`, `mode`, `divide_freq`, `network_G.*`, `network_G.flow.*` and LLFlow's own keys. What asks for an
        architecture that is not served raises ValueError, which names the key, or the system and the nearest that is served.
        """
        return cls(**architecture(options))
