"""The tensors of a checkpoint file, whichever program wrote it and however it wraps the state dict."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ncsr_fast.files import CheckpointError, check_weights, read_checkpoint

# keys under which files hold a state dict, in order of preference: BasicSR also has the average of the weights
_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net_g", "generator")
_PREFIX = re.compile(
    r"^(?:module\.|_orig_mod\.)+"
)  # prefixes of DataParallel and DistributedDataParallel, and of torch.compile
# keys of training states of the published trainers and BasicSR (.state), which write the network to another file
_STATE_KEYS = ("optimizers", "schedulers", "optimizer", "optimizer_states")


class StateDict(NamedTuple):
    """Tensors by name, with their names in the file."""

    tensors: dict[str, Tensor]
    names: dict[str, str]  # name → name in the file


class Entry(NamedTuple):
    """One published tensor: its name and shape, and the tensor of ours that it is (None: no computation uses it)."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor | None


def read_state_dict(source: Mapping[str, Any] | str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a mapping or in a .pth or .safetensors file, unwrapped, without a `module.` prefix.

    Nothing in a file is executed. Raises FileNotFoundError, or CheckpointError for a file that cannot be read, holds no
    weights, or holds NaN or infinity.
    """
    return read_named(source).tensors


def read_named(source: Mapping[str, Any] | str | os.PathLike) -> StateDict:
    """The state dict as by `read_state_dict`, with the names in the file."""
    where, state = "the checkpoint", source
    if isinstance(source, (str, os.PathLike)):
        where, state = repr(os.fspath(source)), read_checkpoint(source)
    path = ""
    while isinstance(state, Mapping):
        key = next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if key is None:
            break
        state, path = state[key], f"{path}{key}/"
    if isinstance(state, Mapping) and any(key in state for key in _STATE_KEYS):
        raise CheckpointError(
            f"{where} is a training state: it holds {', '.join(map(str, state))} but no network; give the network's file, "
            "which the published trainers write to models/ITERATION_G.pth"
        )
    check_weights(state, where)
    names = {_PREFIX.sub("", name): path + name for name in state}
    if len(names) < len(state):
        raise CheckpointError(f"{where} holds tensors whose names differ only by a prefix module.")
    return StateDict(dict(zip(names, state.values())), names)
