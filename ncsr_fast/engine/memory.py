"""The memory that the engine uses for optional purposes: more samples at a time, and caches between calls."""

from __future__ import annotations

import torch

_SHARE = 8  # the engine uses one part in this many
_OF_CPU = 8 * 2**30  # bytes assumed for a CPU, whose memory other programs use too


def spare_bytes(device: torch.device) -> int:
    """An eighth of a GPU's memory, 1 GiB of a CPU's."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _OF_CPU
    return total // _SHARE
