"""RRDB networks in files of the published programs and directories of this package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ncsr_fast import files
from ncsr_fast.encoder.names import GeneratorState, configuration_of, encoder_layout, read_generator

if TYPE_CHECKING:
    from ncsr_fast.encoder.rrdb import RRDB


def load_published(network: RRDB, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
    """Implementation of `RRDB.load_published`."""
    found = read_generator(source)
    if found.from_flow and network.long_skip != "last_block":
        raise files.CheckpointError(
            "the checkpoint is a flow's, whose encoder has its long skip from the last block, but this network has it from the "
            "first convolution: build the network with long_skip='last_block'"
        )
    _load(network, found)


def from_pretrained(make: Callable[..., RRDB], path: Path, long_skip: str | None, unshuffle: int | None) -> RRDB:
    """Implementation of `RRDB.from_pretrained` for a local directory or file; `make` makes a network without weights."""
    if not path.is_dir():
        return from_state(make, read_generator(path), long_skip, unshuffle)
    unrecorded = {"long_skip": long_skip or "last_block"}  # versions that had no other did not record it
    network = files.load_directory(path, "rrdb", lambda values: make(**{**unrecorded, **values}))
    for name, asked in (("long_skip", long_skip), ("unshuffle", unshuffle)):
        if asked not in (None, getattr(network, name)):
            raise ValueError(f"{name}={asked!r}: {str(path)!r} holds a network with {name}={getattr(network, name)!r}")
    return network


def from_state(
    make: Callable[..., RRDB], state: GeneratorState, long_skip: str | None = None, unshuffle: int | None = None
) -> RRDB:
    """A generator of the sizes given by the shapes; long_skip and unshuffle as for `RRDB.from_pretrained`."""
    if state.from_flow:
        if long_skip not in (None, "last_block"):
            raise ValueError(f"long_skip={long_skip!r}: the file is a flow's, and its encoder has 'last_block'")
        long_skip = "last_block"
    network = make(**configuration_of(state.tensors, unshuffle), long_skip=long_skip or "conv_first")
    files.adopt_dtype(network, state.tensors)
    _load(network, state)
    return network


def _load(network: RRDB, state: GeneratorState) -> None:
    """Copy a state dict into `network`; if any tensor does not fit, raise CheckpointError and change nothing."""
    entries = list(encoder_layout(network))
    files.compare({entry.name: entry.shape for entry in entries}, state.tensors, f"this encoder ({network.describe()})")
    for entry in entries:
        entry.tensor.copy_(state.tensors[entry.name])
