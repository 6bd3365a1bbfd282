"""A flow described by data: everything needed to build a model, except its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NCSR_X4 = {"scale": 4, "steps": 16, "noise_channels": 3, "noise_steps": (0, 16, 16)}
_NCSR_X8 = {"scale": 8, "steps": 20, "noise_channels": 3, "noise_steps": (0, 0, 16, 16)}

PRESETS: dict[str, dict[str, Any]] = {
    "ncsr-x4": _NCSR_X4,
    "ncsr-x8": _NCSR_X8,
    "srflow-x4": {"scale": 4},
    "srflow-x8": {"scale": 8, "stacked_blocks": (1, 3, 5, 7)},
    "ncsr-compact-x4": {
        **_NCSR_X4,
        "channels": 32,
        "growth": 16,
        "blocks": 4,
        "stacked_blocks": (0, 1, 2, 3),
        "steps": 4,
        "hidden_channels": 32,
        "noise_steps": (0, 4, 4),
    },
}


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for name, allowed in (("prior", ("standard", "encoder")), ("base", (None, "bicubic"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if not self.levels:
            raise ValueError("a flow needs a level")
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
    """Architecture of an NCSR or SRFlow model.

    The defaults are the published SRFlow ×4. Levels are counted from the HR side: level ℓ works at
    1/2^ℓ of the HR size, and there are log2(scale) + 1 of them, so that the last one works at half
    the LR size.

    Args:
        scale: Super-resolution factor, 4 or 8.
        channels: Width of the encoder (`nf` of the published options).
        growth: Channels that each convolution of a dense block adds (`gc`).
        blocks: Number of residual-in-residual dense blocks of the encoder (`nb`).
        stacked_blocks: Indices of the blocks whose outputs condition the flow.
        steps: Conditional steps of each level (`K`).
        transition_steps: Transition steps (actnorm and 1×1 convolution) at the beginning of each level.
        hidden_channels: Width of the injector and coupling networks.
        noise_channels: 0: not conditioned on noise (SRFlow); 3: conditioned on the noise image (NCSR); 1: conditioned on the
            standard deviation of the noise.
        noise_steps: For each level, the number of its last steps that have a noise coupling (`S`); zero for all levels with
            noise_channels > 0 is NCSR "without the layer".
        eps: Lower bound of the scale of a coupling or an injector.
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

    def __post_init__(self) -> None:
        if self.scale not in (4, 8):
            raise ValueError(f"scale must be 4 or 8, not {self.scale!r}")
        if self.noise_channels not in (0, 1, 3):
            raise ValueError(
                f"noise_channels must be 0 (SRFlow), 1 (standard deviation) or 3 (noise), not {self.noise_channels!r}"
            )
        for name in ("channels", "growth", "blocks", "steps", "hidden_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if not isinstance(self.transition_steps, int) or self.transition_steps < 0:
            raise ValueError(f"transition_steps must be an integer ≥ 0, not {self.transition_steps!r}")
        object.__setattr__(self, "stacked_blocks", tuple(self.stacked_blocks))
        object.__setattr__(self, "noise_steps", tuple(self.noise_steps) or (0,) * self.levels)
        if len(set(self.stacked_blocks)) != len(self.stacked_blocks) or any(
            not 0 <= index < self.blocks for index in self.stacked_blocks
        ):
            raise ValueError(
                f"stacked_blocks must be distinct block indices below blocks={self.blocks}, not {self.stacked_blocks}"
            )
        if len(self.noise_steps) != self.levels:
            raise ValueError(f"noise_steps must have one entry for each of the {self.levels} levels: {self.noise_steps}")
        if any(count < 0 for count in self.noise_steps):
            raise ValueError(f"noise_steps must not be negative: {self.noise_steps}")
        if self.noise_channels == 0 and any(self.noise_steps):
            raise ValueError(f"noise_steps={self.noise_steps} needs noise_channels 1 or 3")
        # the published rule "noise_steps >= K - k" lets a level ask for more steps than it has
        object.__setattr__(self, "noise_steps", tuple(min(count, self.steps) for count in self.noise_steps))

    @property
    def levels(self) -> int:
        """Number of flow levels, log2(scale) + 1."""
        return self.scale.bit_length()

    @property
    def condition_channels(self) -> int:
        """Channels of the conditioning features u of every level."""
        return self.channels * (1 + len(self.stacked_blocks))

    def level_channels(self) -> list[int]:
        """Channels C of the state inside each level, from the HR side (×4: 12, 24, 96)."""
        channels, inside = 3, []
        for level in range(self.levels):
            channels *= 4
            inside.append(channels)
            channels -= self.split_channels(level, channels)
        return inside

    def split_channels(self, level: int, channels: int) -> int:
        """Number of channels that the split of `level` (from 0) takes out; 0 if there is no split.

        The published models split after every level but the last two.
        """
        return round(channels * 0.5) if level < self.levels - 2 else 0

    @property
    def flow(self) -> FlowConfig:
        """The `FlowConfig` of this architecture."""
        levels = []
        for index, channels in enumerate(self.level_channels()):
            noise = Branch("noise_couplings", "noise", steps=self.noise_steps[index])
            branches = (INJECTORS, noise, COUPLINGS)
            split = self.split_channels(index, channels)
            levels.append(LevelConfig(self.steps, self.condition_channels, branches, self.transition_steps, split))
        return FlowConfig(
            self.scale,
            tuple(levels),
            hidden_channels=self.hidden_channels,
            noise_channels=self.noise_channels,
            eps=self.eps,
        )

    @classmethod
    def preset(cls, name: str) -> NCSRConfig:
        """The configuration called `name`: "ncsr-x4", "ncsr-x8", "srflow-x4", "srflow-x8", "ncsr-compact-x4"."""
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
        """The configuration of a published NCSR or SRFlow YAML, given as the dict a YAML reader returns.

        Reads `scale`, `mode`, `network_G.*` and `network_G.flow.*`. ValueError names a key that asks for an
        architecture that this library does not have.
        """
        network = _section(options, "network_G")
        flow = _section(network, "flow", "network_G.flow")
        kind = network.get("which_model_G")
        if kind not in ("NCSRNet", "SRFlowNet"):
            raise ValueError(f"network_G.which_model_G must be 'NCSRNet' or 'SRFlowNet', not {kind!r}")
        scale = options.get("scale", network.get("upscale"))
        if scale is None:
            raise ValueError("the options have no 'scale'")
        stacked = flow.get("stackRRDB") or {}
        split = flow.get("split") or {}
        requirements = {
            "network_G.in_nc": (network.get("in_nc", 3), 3),
            "network_G.out_nc": (network.get("out_nc", 3), 3),
            "network_G.flow.coupling": (flow.get("coupling"), "CondAffineSeparatedAndCond"),
            "network_G.flow.flow_permutation": (flow.get("flow_permutation", "invconv"), "invconv"),
            "network_G.flow.fea_up0": (flow.get("fea_up0"), True),
            "network_G.flow.stackRRDB.concat": (stacked.get("concat"), True),
            "network_G.flow.split.enable": (split.get("enable"), True),
            "network_G.flow.split.correct_splits": (bool(split.get("correct_splits")), False),
            "network_G.flow.split.conditional": (bool(split.get("conditional")), False),
            "network_G.flow.split.consume_ratio": (split.get("consume_ratio") or 0.5, 0.5),
            "network_G.flow.split.logs_eps": (split.get("logs_eps") or 0, 0),
            "network_G.flow.norm": (flow.get("norm"), None),
        }
        for key, (value, supported) in requirements.items():
            if value != supported:
                raise ValueError(f"{key} = {value!r} is not supported, only {supported!r}")
        coupling = flow.get("CondAffineSeparatedAndCond") or {}
        noise: dict[str, Any] = {}
        if kind == "NCSRNet":
            conditioned = options.get("mode", "softflow") == "softflow"  # otherwise the program passes no noise
            noise = {
                "noise_channels": flow.get("std_channels", 3),
                "noise_steps": tuple(flow.get("S") or ()) if conditioned else (),
            }
        config = cls(
            scale=scale,
            channels=network.get("nf", 64),
            growth=network.get("gc", 32),
            blocks=network.get("nb", 23),
            stacked_blocks=tuple(stacked.get("blocks") or ()),
            steps=flow.get("K", 16),
            transition_steps=int(flow.get("additionalFlowNoAffine", 0)),
            hidden_channels=coupling.get("hidden_channels") or 64,
            eps=coupling.get("eps", 1e-4),
            **noise,
        )
        if flow.get("L", config.levels) != config.levels:
            raise ValueError(f"network_G.flow.L = {flow['L']} is not supported: scale {scale} has {config.levels} levels")
        return config


def _section(options: Mapping[str, Any], key: str, label: str | None = None) -> Mapping[str, Any]:
    section = options.get(key)
    if not isinstance(section, Mapping):
        raise ValueError(f"the options have no section {label or key!r}")
    return section
