"""The tensors in a checkpoint file, whoever wrote it and whatever it wrapped them in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ncsr_fast.files import CheckpointError, check_weights, read_checkpoint

# keys under which files hold a state dict, the first of them first: BasicSR keeps the average of the weights beside them
_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net_g", "generator")
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and DistributedDataParallel, and of torch.compile
# what training states hold: of the published trainers and BasicSR (.state), which put the network in a file of its own
_STATE_KEYS = ("optimizers", "schedulers", "optimizer", "optimizer_states")


class StateDict(NamedTuple):
    """Tensors by name, and where in the file they were."""

    tensors: dict[str, Tensor]
    names: dict[str, str]  # name → name in the file


class Entry(NamedTuple):
    """One published tensor: its name and shape, and the tensor of ours that it is (None: no computation uses it)."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor | None


def read_state_dict(source: Mapping[str, Any] | str | os.PathLike) -> dict[str, Tensor]:
    """A state dict from itself or from a .pth or .safetensors file, unwrapped, without a `module.` prefix.

    Of a training state, or of anything else that wraps a state dict, the state dict. Nothing in a file is executed. Raises
    FileNotFoundError, or CheckpointError for a file that cannot be read, holds no weights, or NaN or infinity.
    """
    return read_named(source).tensors


def read_named(source: Mapping[str, Any] | str | os.PathLike) -> StateDict:
    """The same, with the names the tensors had."""
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
            f"{where} is a training state: it holds {', '.join(map(str, state))} and no network; give the network's file, "
            "which the published trainers write to models/ITERATION_G.pth"
        )
    check_weights(state, where)
    names = {_PREFIX.sub("", name): path + name for name in state}
    if len(names) < len(state):
        raise CheckpointError(f"{where} holds tensors whose names differ by a prefix module. alone")
    return StateDict(dict(zip(names, state.values())), names)
