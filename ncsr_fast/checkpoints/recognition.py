"""The published system that a state dict is of, as its names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ncsr_fast.systems import SYSTEMS

# what a name in the state dict of a system has, and no name in those of the systems behind it
_SIGNS = {
    "llflow": r"RRDB\.fine_tune_color_map\.",
    "ncsr": r"affine\.fAffine_std\.",
    "srflow-da-d": r"affine\.fAffine2\.\d+\.\d+\.",
    "srflow-da-r": r"affine\.fAffine2\.\d+\.weight",
    "srflow-da": r"affine\.fAffine\.6\.",
}


def system_in(state: Mapping[str, Tensor]) -> str | None:
    """The name in `SYSTEMS` of the system that a published state dict looks like; None for one that is no flow's.

    FS-NCSR's networks are NCSR's, and those of SRFlow are those of NCSR without noise: "ncsr".
    """
    if not any(name.startswith("flowUpsamplerNet.layers.") for name in state):
        return None
    system = next((system for system, sign in _SIGNS.items() if any(re.search(sign, name) for name in state)), "ncsr")
    if system == "srflow-da" and _first_channels(state) != _first_channels_of("srflow-da"):
        return "srflow-da-s"
    return "ctflow" if system == "ncsr" and _first_channels(state) == _first_channels_of("ctflow") else system


def likeness(state: Mapping[str, Tensor]) -> str:
    """The system that a state dict looks like, in words."""
    system = system_in(state)
    if system is None:
        return "no flow"
    if system != "ncsr":
        return SYSTEMS[system].title
    return "NCSR or FS-NCSR" if any("fAffine_std" in name for name in state) else "SRFlow"


def _first_channels(state: Mapping[str, Tensor]) -> int:
    """Channels of the state in the first level; 0 where no tensor tells."""
    weight = state.get("flowUpsamplerNet.layers.1.invconv.weight")
    return 0 if weight is None else weight.shape[0]


def _first_channels_of(system: str) -> int:
    return 4 * SYSTEMS[system].channels
