"""Models in files: the published programs' checkpoints, our directories, and the shipped model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncsr_fast import files
from ncsr_fast.config import PRESETS, NCSRConfig
from ncsr_fast.hub import find_model
from ncsr_fast.nn import published
from ncsr_fast.nn.state_dicts import read_state_dict

if TYPE_CHECKING:
    from ncsr_fast.nn.ncsr import NCSR


class Checkpoints:
    """The part of `NCSR` that reads and writes weights."""

    config: NCSRConfig

    def load_published(self, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load the state dict of a published NCSR or SRFlow network, or the .pth or .safetensors
        file that holds one.

        Strict: raises CheckpointError naming what is missing, unexpected or of the wrong shape, and then changes
        nothing. Tensors no computation uses are kept for `published_state_dict`. The actnorms count as
        initialised when any of them is not zero, the published program's own rule.
        """
        self.refuse_when_frozen("load_published()")
        published.load_network(self, read_state_dict(source))

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and shapes of the published programs, unused tensors included.

        Those are the ones last loaded, or zeros in a model that never loaded any.
        """
        return published.network_state_dict(self)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        config: NCSRConfig | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> NCSR:
        """A model from a directory written by `save_pretrained`, a file, the package, or the Hugging Face Hub.

        path     a directory; a published .pth or .safetensors, or a checkpoint of `ncsr-fast train`; the name of the shipped
                 model, "ncsr-compact-x4"; or a repository "user/name" of the Hub. `ncsr_fast.hub.find_model` has the rules.
        config   of a file; None finds the preset whose tensors have the file's names and shapes, or a training run's own
        revision, cache_dir, token, local_files_only  of the Hub, as `huggingface_hub.snapshot_download` has them
        options  of `EngineOptions`
        raises   FileNotFoundError, CheckpointError for a file that is corrupt or of another model, or ImportError for a
                 repository without huggingface_hub
        """
        path = find_model(path, revision, cache_dir, token, local_files_only)
        if path.is_dir():
            if config is not None:
                raise ValueError(f"config belongs to a file; {str(path)!r} is a directory with its own {files.CONFIG}")
            return files.load_directory(path, "ncsr", lambda values: cls(NCSRConfig.from_dict(values), **options))
        return cls.from_state_dict(read_state_dict(path), path, config, **options)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], path: Path, config: NCSRConfig | None, **options: Any) -> NCSR:
        """A model from what the file `path` holds: a published state dict, or one of ours."""
        if is_own(state):
            model = cls(_config_of_run(path) if config is None else config, **options)
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            files.compare(expected, state, f"this model ({model.describe()})")
            files.adopt_dtype(model, state)
            model.load_state_dict(state)
        else:
            model = cls(_matching_config(cls, state, path) if config is None else config, **options)
            files.adopt_dtype(model, state)
            published.load_network(model, state)
        return model

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write `config.json` and `model.safetensors` to `directory`, each atomically; return it."""
        return files.save_directory(self, "ncsr", self.config.to_dict(), directory)

    def describe(self) -> str:
        """The model in a few words, for messages."""
        config = self.config
        kind = {0: "SRFlow", 1: "NCSR, std-conditional", 3: "NCSR, noise-conditional"}[config.noise_channels]
        return f"{kind}, ×{config.scale}, {config.blocks} blocks, {config.steps} steps a level"


def is_own(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of our modules, and not the published ones."""
    return "levels.0.actnorm_bias" in state


def _config_of_run(path: Path) -> NCSRConfig:
    """The configuration of RUN/checkpoints/STAGE-STEP.pt."""
    settings = path.absolute().parents[1] / "settings.json"
    try:
        return NCSRConfig.from_dict(files.read_json(settings)["model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise files.CheckpointError(
            f"{str(path)!r} has our tensors, but no {str(settings)!r} says of which model: give its config, or the "
            "directory RUN/model that a training run ends with"
        ) from error


def _matching_config(model_class: type[NCSR], state: Mapping[str, Tensor], path: Path) -> NCSRConfig:
    """The preset, or its std-conditional variant, whose published tensors have exactly these names and shapes."""
    presets = [NCSRConfig.preset(name) for name in PRESETS]
    variants = [replace(config, noise_channels=1) for config in presets if config.noise_channels == 3]
    celeba = NCSRConfig(scale=8, blocks=8, stacked_blocks=(1, 3, 5, 7))  # SRFlow's face model
    found = []
    for config in [*presets, *variants, celeba]:
        with torch.device("meta"):
            model = model_class(config)
        problems = files.differences({entry.name: entry.shape for entry in published.layout(model)}, state)
        if not problems:
            return config
        found.append((sum(map(len, problems.values())), model.describe(), problems))
    _, nearest, problems = min(found, key=lambda candidate: candidate[0])
    raise files.CheckpointError(
        f"{str(path)!r} has the tensors of no preset ({', '.join(PRESETS)}); of the nearest, {nearest}, it has "
        f"{files.listed(problems)}. Say which model it is: "
        "NCSR.from_pretrained(path, config=NCSRConfig.from_published(options))",
        problems,
    )
