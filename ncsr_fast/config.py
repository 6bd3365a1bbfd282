"""The shape of a model: everything needed to build one, and nothing about its weights."""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class NCSRConfig:
    """Architecture of an NCSR or SRFlow model.

    The defaults are the published SRFlow ×4. Levels are counted from the HR side: level ℓ works at
    1/2^ℓ of the HR size, and there are log2(scale) + 1 of them, so that the last one works at half
    the LR size.

    scale            super-resolution factor, 4 or 8
    channels         width of the encoder (`nf` of the published options)
    growth           channels each dense-block convolution adds (`gc`)
    blocks           number of residual-in-residual dense blocks of the encoder (`nb`)
    stacked_blocks   indices of the blocks whose outputs condition the flow
    steps            conditional flow steps of each level (`K`)
    transition_steps unconditional steps (actnorm + 1×1 convolution) that open each level
    hidden_channels  width of the injector and coupling networks
    noise_channels   0: no noise-conditional layer (SRFlow); 3: conditioned on the noise image (NCSR);
                     1: conditioned on its standard deviation
    noise_steps      for each level, how many of its last steps carry a noise-conditional layer (`S`);
                     all zero with noise_channels > 0 is NCSR "without the layer"
    eps              lower bound of a coupling's or injector's scale
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
        """Channels that the split closing `level` (from 0) takes out; 0 where there is no split.

        The published models split after every level but the last two.
        """
        return round(channels * 0.5) if level < self.levels - 2 else 0

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

        Reads `scale`, `mode`, `network_G.*` and `network_G.flow.*`. A key that asks for an architecture
        this library does not have raises ValueError and names the key.
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
