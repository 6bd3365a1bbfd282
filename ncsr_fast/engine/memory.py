"""The memory that the engine uses for optional purposes: more samples at a time, and caches between calls."""

from __future__ import annotations

import torch

from ncsr_fast.memory import free_bytes

_AT_ONCE = 256 * 2**20
_SHARE = 8  # the engine uses one part in this many
_SHARE_OF_FREE = 4  # one in this many of what is free
_OF_CPU = 8 * 2**30  # bytes assumed for a CPU, whose memory other programs use too


def spare_bytes(device: torch.device) -> int:
    """An eighth of a GPU's memory, 1 GiB of a CPU's."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _OF_CPU
    return total // _SHARE


def at_once(device: torch.device) -> int:
    """Bytes of pre-activations computed together where no backward pass saves them: 256 MiB, of a GPU what is spare."""
    return spare_bytes(device) if device.type == "cuda" else _AT_ONCE


def budget(device: torch.device) -> int:
    """Bytes that tile="auto" allows to what is computed of one tile: twice `spare_bytes`, or a quarter of what is free."""
    free, most = free_bytes(device), 2 * spare_bytes(device)
    return most if free is None else min(most, free // _SHARE_OF_FREE)
