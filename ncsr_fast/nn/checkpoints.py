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
from ncsr_fast.nn import published

if TYPE_CHECKING:
    from ncsr_fast.nn.ncsr import NCSR


class Checkpoints:
    """The part of `NCSR` that reads and writes weights."""

    config: NCSRConfig

    def load_published(self, source: Mapping[str, Tensor] | str | os.PathLike) -> None:
        """Load the state dict of a published NCSR or SRFlow network, or the .pth file that holds one.

        Strict: raises CheckpointError naming what is missing, unexpected or of the wrong shape, and then changes
        nothing. Tensors no computation uses are kept for `published_state_dict`. The actnorms count as
        initialised when any of them is not zero, the published program's own rule.
        """
        published.load_network(self, published.read_state_dict(source))

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and shapes of the published programs, unused tensors included.

        Those are the ones last loaded, or zeros in a model that never loaded any.
        """
        return published.network_state_dict(self)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, config: NCSRConfig | None = None, **options: Any) -> NCSR:
        """A model from a directory written by `save_pretrained`, a published .pth, or the name of a shipped model.

        path     the only shipped model is "ncsr-compact-x4"
        config   of a published .pth; None finds the preset whose tensors have the file's names and shapes
        options  of `EngineOptions`
        raises   FileNotFoundError, or CheckpointError for a file that is corrupt or of another model
        """
        path = Path(path)
        if not path.exists() and path.name in files.shipped() and path == Path(path.name):
            path = files.SHIPPED / path
        if not path.exists():
            raise FileNotFoundError(f"no model at {str(path)!r}; shipped models: {', '.join(files.shipped()) or 'none'}")
        if path.is_dir():
            if config is not None:
                raise ValueError(
                    f"config belongs to a published .pth; {str(path)!r} is a directory with its own {files.CONFIG}"
                )
            return files.load_directory(path, "ncsr", lambda values: cls(NCSRConfig.from_dict(values), **options))
        state = published.read_state_dict(path)
        model = cls(_matching_config(cls, state, path) if config is None else config, **options)
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


def _matching_config(model_class: type[NCSR], state: Mapping[str, Tensor], path: Path) -> NCSRConfig:
    """The preset, or its std-conditional variant, whose published tensors have exactly these names and shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    presets = [NCSRConfig.preset(name) for name in PRESETS]
    variants = [replace(config, noise_channels=1) for config in presets if config.noise_channels == 3]
    celeba = NCSRConfig(scale=8, blocks=8, stacked_blocks=(1, 3, 5, 7))  # SRFlow's face model
    for config in [*presets, *variants, celeba]:
        with torch.device("meta"):
            model = model_class(config)
        if shapes == {entry.name: entry.shape for entry in published.layout(model)}:
            return config
    raise files.CheckpointError(
        f"{str(path)!r} has the tensors of no preset ({', '.join(PRESETS)}); say which model it is: "
        "NCSR.from_pretrained(path, config=NCSRConfig.from_published(options))"
    )
