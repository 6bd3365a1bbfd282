"""Models on disk: a directory with config.json and model.safetensors, or a published .pth file."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import torch

from ncsr_fast.config import PRESETS, NCSRConfig
from ncsr_fast.nn.encoder import RRDB
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.nn.published import (
    CheckpointError,
    compare,
    encoder_configuration,
    layout,
    load_encoder,
    load_network,
    read_encoder_state_dict,
    read_state_dict,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "models"
_TYPES = {NCSR: "ncsr", RRDB: "rrdb"}  # model_type of config.json

Model = TypeVar("Model", NCSR, RRDB)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path`, flushed to disk and renamed to it when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp made it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(model: NCSR | RRDB, directory: str | os.PathLike) -> Path:
    """See `NCSR.save_pretrained` and `RRDB.save_pretrained`."""
    from safetensors.torch import save_file

    directory = Path(directory)
    kind = _TYPES[type(model)]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(directory / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps({"model_type": kind, **_configuration(model)}, indent=2) + "\n")
    return directory


def load_pretrained(path: str | os.PathLike, config: NCSRConfig | None = None) -> NCSR:
    """See `NCSR.from_pretrained`."""
    path = Path(path)
    if not path.exists() and path == Path(path.name) and (SHIPPED / path).is_dir():
        path = SHIPPED / path
    if not path.exists():
        raise FileNotFoundError(f"no model at {str(path)!r}; shipped models: {', '.join(shipped()) or 'none'}")
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config belongs to a published .pth; {str(path)!r} is a directory with its own {CONFIG}")
        return _load_directory(path, NCSR, lambda values: NCSR(NCSRConfig.from_dict(values)))
    state = read_state_dict(path)
    model = NCSR(_matching_config(state, path) if config is None else config)
    load_network(model, state)
    return model


def load_pretrained_encoder(path: str | os.PathLike) -> RRDB:
    """See `RRDB.from_pretrained`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no encoder at {str(path)!r}")
    if path.is_dir():
        return _load_directory(path, RRDB, lambda values: RRDB(**values))
    state = read_encoder_state_dict(path)
    encoder = RRDB(**encoder_configuration(state))
    load_encoder(encoder, state)
    return encoder


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(entry.name for entry in SHIPPED.iterdir() if (entry / WEIGHTS).is_file()) if SHIPPED.is_dir() else []


def _configuration(model: NCSR | RRDB) -> dict[str, Any]:
    """What the model is built from, JSON-ready."""
    return model.config.to_dict() if isinstance(model, NCSR) else model.configuration()


def _load_directory(path: Path, kind: type[Model], build: Callable[[dict[str, Any]], Model]) -> Model:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{str(path)!r} has no {name}; a model directory is written by save_pretrained")
    try:
        values = json.loads((path / CONFIG).read_text())
        if values.pop("model_type", None) != _TYPES[kind]:
            raise ValueError(f"its model_type is not {_TYPES[kind]!r}")
        model = build(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(path / CONFIG)!r} is not the configuration of an {kind.__name__}: {error}") from error
    try:
        state = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path / WEIGHTS)!r} is truncated or corrupt: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare(expected, state, f"the model of {CONFIG} ({model.describe()})")
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        model.to(floats.pop())
    model.load_state_dict(state)
    return model


def _matching_config(state: dict[str, torch.Tensor], path: Path) -> NCSRConfig:
    """The preset, or its std-conditional variant, whose published tensors have exactly these names and shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    presets = [NCSRConfig.preset(name) for name in PRESETS]
    variants = [replace(config, noise_channels=1) for config in presets if config.noise_channels == 3]
    celeba = NCSRConfig(scale=8, blocks=8, stacked_blocks=(1, 3, 5, 7))  # SRFlow's face model
    for config in [*presets, *variants, celeba]:
        with torch.device("meta"):
            model = NCSR(config)
        if shapes == {entry.name: entry.shape for entry in layout(model)}:
            return config
    raise CheckpointError(
        f"{str(path)!r} has the tensors of no preset ({', '.join(PRESETS)}); say which model it is: "
        "NCSR.from_pretrained(path, config=NCSRConfig.from_published(options))"
    )
