"""How much memory the engine takes for what it could do without: more samples at a time, results kept for the next call."""

from __future__ import annotations

import torch

_SHARE = 8  # one in this many parts of the memory
_OF_CPU = 8 * 2**30  # bytes counted on where the memory is the CPU's, which has other users


def spare_bytes(device: torch.device) -> int:
    """An eighth of a GPU's memory, 1 GiB of a CPU's."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _OF_CPU
    return total // _SHARE
