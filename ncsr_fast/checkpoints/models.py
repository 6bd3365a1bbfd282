"""Models in files: checkpoints of the published programs, directories of this package, and the shipped model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ncsr_fast import files
from ncsr_fast.checkpoints import published
from ncsr_fast.checkpoints.recognition import recognised_system
from ncsr_fast.checkpoints.state_dicts import read_state_dict
from ncsr_fast.config import PRESETS, NCSRConfig

if TYPE_CHECKING:
    from ncsr_fast.model import NCSR


def load_model(make: Callable[[NCSRConfig], NCSR], path: Path, config: NCSRConfig | None) -> NCSR:
    """A model from a directory written by `save_pretrained`, or from a file.

    Args:
        make: Function that makes a model without weights.
        path: The directory or file.
        config: The configuration of a model in a file; None finds it.

    Raises:
        ValueError: `config` is given for a directory, which has its own.
        CheckpointError: As for `load_state_dict`.
    """
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config belongs to a file; {str(path)!r} is a directory with its own {files.CONFIG}")
        return files.load_directory(path, "ncsr", lambda values: make(NCSRConfig.from_dict(values)))
    return model_of_state_dict(make, read_state_dict(path), path, config)


def model_of_state_dict(
    make: Callable[[NCSRConfig], NCSR], state: Mapping[str, Tensor], path: Path | None, config: NCSRConfig | None
) -> NCSR:
    """A model from a state dict, published or of this package.

    Args:
        make: Function that makes a model without weights.
        state: The tensors by name.
        path: The file that they are from; None for a state dict alone.
        config: The configuration; None finds it: a preset's, or of a checkpoint in a training run the run's.
    """
    if is_own(state):
        if config is None:
            config = _matching_config(make, state, "the state dict") if path is None else _config_of_run(path)
        model = make(config)
        files.compare(_own_shapes(model), state, f"this model ({model.describe()})")
        files.adopt_dtype(model, state)
        model.load_state_dict(state)
    else:
        where = "the state dict" if path is None else repr(str(path))
        model = make(_matching_config(make, state, where) if config is None else config)
        files.adopt_dtype(model, state)
        published.load_network(model, state)
    return model


def describe(config: NCSRConfig) -> str:
    """A description of a model in a few words, for messages."""
    condition = {0: "", 1: ", std-conditional", 3: ", noise-conditional"}[config.noise_channels]
    kind = "SRFlow" if config.system == "ncsr" and not condition else config.traits.title + condition
    where = "in one level" if config.traits.split_period else "per level"
    return f"{kind}, ×{config.scale}, {config.blocks} blocks, {config.steps} steps {where}"


def is_own(state: Mapping[str, Tensor]) -> bool:
    """True if the names are those of this package's modules, not the published names."""
    return "levels.0.actnorm_bias" in state


def _config_of_run(path: Path) -> NCSRConfig:
    """The configuration of RUN/checkpoints/STAGE-STEP.pt."""
    settings = path.absolute().parents[1] / "settings.json"
    try:
        return NCSRConfig.from_dict(files.read_json(settings)["model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise files.CheckpointError(
            f"{str(path)!r} has the tensors of this package, but {str(settings)!r}, which describes the model, is missing: "
            "give its config, or the directory RUN/model of the training run"
        ) from error


def _matching_config(make: Callable[[NCSRConfig], NCSR], state: Mapping[str, Tensor], where: str) -> NCSRConfig:
    """The preset, or its std-conditional variant, whose tensors, published or own, have exactly these names and shapes.

    Of FS-NCSR, whose tensors are as NCSR's, it is NCSR's.

    Raises:
        CheckpointError: None has, or, of this package's names, several have that compute different things.
    """
    own = is_own(state)
    presets = {name: NCSRConfig.preset(name) for name in PRESETS}
    if not own:
        system = recognised_system({name: tensor.shape for name, tensor in state.items()}) or "ncsr"
        presets = {name: config for name, config in presets.items() if config.system == system}
    candidates = [config for config in presets.values() if config.system != "fs-ncsr"]
    if own or system == "ncsr":
        candidates += [replace(config, noise_channels=1) for config in candidates if config.noise_channels == 3]
        candidates.append(NCSRConfig(scale=8, blocks=8, stacked_blocks=(1, 3, 5, 7)))  # SRFlow's face model
    fitting, others = [], []
    for config in candidates:
        with torch.device("meta"):
            model = make(config)
        problems = files.differences(_own_shapes(model) if own else _published_shapes(model), state)
        if not problems:
            fitting.append(config)
            if not own:  # whose names tell the systems apart
                return config
        else:
            others.append((sum(map(len, problems.values())), model.describe(), problems))
    advice = "Give the model's configuration: NCSR.from_pretrained(path, config=NCSRConfig.from_published(options))"
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise files.CheckpointError(f"{where} fits several models, {'; '.join(map(describe, fitting))}. {advice}")
    _, nearest, problems = min(others, key=lambda candidate: candidate[0])
    raise files.CheckpointError(
        f"{where} fits no preset ({', '.join(PRESETS)}); compared with the nearest, {nearest}, it has "
        f"{files.listed(problems)}. {advice}",
        problems,
    )


def _own_shapes(model: NCSR) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _published_shapes(model: NCSR) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for entry in published.layout(model)}
