"""The tensors in a checkpoint file, whoever wrote it and whatever it wrapped them in."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.files import CheckpointError

# keys under which files hold a state dict, the first of them first: BasicSR keeps the average of the weights beside them
_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net_g", "generator")
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and DistributedDataParallel, and of torch.compile
_SAFETENSORS = ".safetensors"
# what training states hold: of the published trainers and BasicSR (.state), which put the network in a file of its own
_STATE_KEYS = ("optimizers", "schedulers", "optimizer", "optimizer_states")


class StateDict(NamedTuple):
    """Tensors by name, and where in the file they were."""

    tensors: dict[str, Tensor]
    names: dict[str, str]  # name → name in the file


def read_state_dict(source: Mapping[str, Any] | str | os.PathLike) -> dict[str, Tensor]:
    """A state dict from itself or from a .pth or .safetensors file, unwrapped, without a `module.` prefix.

    Of a training state, or of anything else that wraps a state dict, the state dict. .pth files are read with
    `weights_only=True`: nothing in them is executed. Raises FileNotFoundError, or CheckpointError for a file that cannot be
    read or holds no tensors.
    """
    return read_named(source).tensors


def read_named(source: Mapping[str, Any] | str | os.PathLike) -> StateDict:
    """The same, with the names the tensors had."""
    where, state = "the checkpoint", source
    if isinstance(source, (str, os.PathLike)):
        where, state = repr(os.fspath(source)), _load(source)
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
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{where} holds no state dict (a mapping from names to tensors)")
    names = {_PREFIX.sub("", name): path + name for name in state}
    if len(names) < len(state):
        raise CheckpointError(f"{where} holds tensors whose names differ by a prefix module. alone")
    return StateDict(dict(zip(names, state.values())), names)


def _load(path: str | os.PathLike) -> Any:
    name = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {name!r}")
    if os.path.isdir(path):
        raise CheckpointError(f"{name!r} is a folder, not a checkpoint file")
    if name.endswith(_SAFETENSORS):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name!r} is truncated or corrupt: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{name!r} is not a readable PyTorch checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """In one line, what PyTorch says in twenty."""
    refused = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?(\S+)", str(error))
    if refused:
        return f"it holds a {refused[1]}, which is more than tensors and is not run; save the network's state_dict() alone"
    return " ".join(str(error).split("\n")[0].split())[:200]
