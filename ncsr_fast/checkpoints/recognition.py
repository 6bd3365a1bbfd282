"""The published system that a state dict is of, as its names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ncsr_fast.systems import SYSTEMS

# what a name in the state dict of a system has, and no name in those of the systems behind it
_SIGNS = {
    "llflow": r"RRDB\.fine_tune_color_map\.",
    "ncsr": r"affine\.fAffine_std\.",
    "srflow-da-d": r"affine\.fAffine2\.\d+\.\d+\.",
    "srflow-da-r": r"affine\.fAffine2\.\d+\.weight",
    "srflow-da": r"affine\.fAffine\.6\.",
}


def recognised_system(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name in `SYSTEMS` of the system that a published state dict looks like; None for one that is no flow's.

    FS-NCSR's networks are NCSR's, and those of SRFlow are those of NCSR without noise: "ncsr".

    Args:
        shapes: Of the state dict's tensors, by name.
    """
    if not any(name.startswith("flowUpsamplerNet.layers.") for name in shapes):
        return None
    system = next((system for system, sign in _SIGNS.items() if any(re.search(sign, name) for name in shapes)), "ncsr")
    # the first squeeze is by 2, but for one variant
    channels = (*shapes.get("flowUpsamplerNet.layers.1.invconv.weight", ()), 0)[0]
    if system == "srflow-da" and channels != 4 * SYSTEMS["srflow-da"].channels:
        return "srflow-da-s"
    return "ctflow" if system == "ncsr" and channels == 4 * SYSTEMS["ctflow"].channels else system


def likeness(shapes: Mapping[str, Sequence[int]]) -> str:
    """The system that a state dict with tensors of these shapes looks like, in words."""
    system = recognised_system(shapes)
    if system is None:
        return "no flow"
    if system != "ncsr":
        return SYSTEMS[system].title
    return "NCSR or FS-NCSR" if any("fAffine_std" in name for name in shapes) else "SRFlow"
