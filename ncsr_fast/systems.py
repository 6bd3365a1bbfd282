"""The published systems as data: what each has that another has not, and the models of it that were published."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

DEEP_STD = 4 / math.sqrt(3) / 255  # SRFlow-DA's noise, for which each LR image stands for many HR images
TEMPERATURE = 0.9  # of NCSR's and SRFlow's published samples


@dataclass(frozen=True)
class System:
    """What the models of a published system have in common.

    Args:
        title: Its name.
        scales: Those that there are models of.
        smaller_levels: How many levels, the last ones, are smaller than the LR image.
        unsplit_levels: How many levels, the last ones, end without a split.
        split_period: None: levels squeeze by 2. n: one squeeze by the scale, then splits after step 0, n, 2n …
        networks: The kind of the networks, a name in `ncsr_fast.flow.networks.NETWORKS`.
        noise: True where the flow may be conditioned on the noise that was added.
        channels: Of the images.
        lr_channels: Of the LR images.
        lr_multiple: LR images are padded so that their sides are multiples of it, as the published programs do.
        encoder: "rrdb" or "low light".
        base: As of `FlowConfig`.
        gaussian_noise: Standard deviation of the noise that the published network adds to HR images when it is asked to, with
            no term in the likelihood; 0: the noise is uniform dequantisation noise, with its term.
        temperature: Recommended for samples, unless a model's own configuration has another.
        unused_outputs: Outputs of `flowUpsamplerNet.f`, which is in the files and in no computation.
    """

    title: str
    scales: tuple[int, ...] = (4, 8)
    smaller_levels: int = 1
    unsplit_levels: int = 2
    split_period: int | None = None
    networks: str = "glow"
    noise: bool = False
    channels: int = 3
    lr_channels: int = 3
    lr_multiple: int = 2
    encoder: str = "rrdb"
    base: str | None = None
    gaussian_noise: float = 0.0
    temperature: float = TEMPERATURE
    unused_outputs: int = 96

    def levels(self, scale: int) -> int:
        """The number of levels that a published YAML has at this scale, `network_G.flow.L`."""
        return 1 if self.split_period else scale.bit_length() - 1 + self.smaller_levels


_DA = {"smaller_levels": 0, "unsplit_levels": 1, "gaussian_noise": DEEP_STD}  # the top latent has the size of the LR image

SYSTEMS: dict[str, System] = {
    "ncsr": System("NCSR", noise=True),  # without noise_channels SRFlow
    "fs-ncsr": System("FS-NCSR", noise=True, base="bicubic"),
    "srflow-da": System("SRFlow-DA", networks="deep", **_DA),
    "srflow-da-r": System("SRFlow-DA-R", networks="deep-residual", **_DA),
    "srflow-da-d": System("SRFlow-DA-D", networks="deeper-residual", **_DA),
    "srflow-da-s": System("SRFlow-DA-S", networks="deep", split_period=6, **_DA),
    "ctflow": System("CTFlow", (1,), 3, 1, channels=1, lr_channels=1, lr_multiple=8),
    "llflow": System(
        "LLFlow", (1,), 3, 3, lr_channels=6, lr_multiple=8, encoder="low light", temperature=0.0, unused_outputs=384
    ),
}

_NCSR_X4 = {"scale": 4, "steps": 16, "noise_channels": 3, "noise_steps": (0, 16, 16)}
_NCSR_X8 = {"scale": 8, "steps": 20, "noise_channels": 3, "noise_steps": (0, 0, 16, 16)}

# by name, fields of `ncsr_fast.config.NCSRConfig`
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
        "temperature": 0.8,
    },
    "fs-ncsr-x4": {**_NCSR_X4, "system": "fs-ncsr"},
    "fs-ncsr-x8": {**_NCSR_X8, "system": "fs-ncsr"},
    "srflow-da-x4": {"system": "srflow-da", "scale": 4, "steps": 6},
    "srflow-da-x8": {"system": "srflow-da", "scale": 8, "steps": 6},
    "srflow-da-r-x4": {"system": "srflow-da-r", "scale": 4, "steps": 6},
    "srflow-da-r-x8": {"system": "srflow-da-r", "scale": 8, "steps": 6},
    "srflow-da-d-x4": {"system": "srflow-da-d", "scale": 4, "steps": 1},
    "srflow-da-d-x8": {"system": "srflow-da-d", "scale": 8, "steps": 1},
    "srflow-da-s-x4": {"system": "srflow-da-s", "scale": 4, "steps": 12},
    "srflow-da-s-x8": {"system": "srflow-da-s", "scale": 8, "steps": 18},
    "ctflow": {"system": "ctflow", "scale": 1, "blocks": 14, "stacked_blocks": (1, 5, 9, 13), "steps": 16},
    "llflow-lol": {"system": "llflow", "scale": 1, "blocks": 24, "stacked_blocks": (1, 3, 5, 7), "steps": 12},
    "llflow-lol-smallnet": {
        "system": "llflow",
        "scale": 1,
        "channels": 32,
        "blocks": 4,
        "stacked_blocks": (1,),
        "steps": 4,
    },
    "llflow-compact": {
        "system": "llflow",
        "scale": 1,
        "channels": 24,
        "growth": 12,
        "blocks": 2,
        "stacked_blocks": (1,),
        "steps": 2,
        "hidden_channels": 16,
    },
}
