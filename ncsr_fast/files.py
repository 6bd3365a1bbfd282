"""Files of models: written atomically, read without executing anything, and what is wrong with one said in full."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "models"
_TEMPORARY = 40  # characters of a name that a temporary file has too; all of a long one, and more, would be too many
_LISTED = 5  # names an error spells out of each kind


class CheckpointError(ValueError):
    """A file or state dict that is not the model's: corrupt, or with other tensors.

    problems  all tensors that are "missing", "unexpected" or "of the wrong shape", of which the message has the first few
    """

    def __init__(self, message: str, problems: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path`, flushed to disk and renamed to it when the block ends without an error.

    An OSError of writing names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_TEMPORARY]}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with _named_errors(path, name):
            yield temporary
            _move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)  # mkstemp made it private
    os.replace(temporary, path)


@contextmanager
def _named_errors(path: Path, temporary: str | None = None) -> Iterator[None]:
    """Errors of the system as errors of `path`: those of a full disk name no file, others the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (temporary is not None and error.filename not in (None, temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError when the disk is full, where safetensors' own function has another error."""
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), metadata={"format": "pt"}))


def write_pickled(path: Path, value: Any) -> None:
    """Write a file as `torch.save` does. Raises OSError when the disk is full, where that raises an error of its insides."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(entry.name for entry in SHIPPED.iterdir() if (entry / WEIGHTS).is_file()) if SHIPPED.is_dir() else []


def save_directory(model: nn.Module, model_type: str, configuration: dict[str, Any], directory: str | os.PathLike) -> Path:
    """Write config.json (`model_type` and the configuration) and model.safetensors to `directory`; return it."""
    directory = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(directory / WEIGHTS) as path:
        write_tensors(path, tensors)
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps({"model_type": model_type, **configuration}, indent=2) + "\n")
    return directory


def load_directory(directory: Path, model_type: str, build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """The model of a directory written by `save_directory`; `build` makes it from its configuration.

    raises  FileNotFoundError, or CheckpointError for files that are corrupt, of another type, or do not fit each other
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{str(directory)!r} has no {name}; a model directory is written by save_pretrained")
    try:
        values = json.loads((directory / CONFIG).read_text())
        if values.pop("model_type", None) != model_type:
            raise ValueError(f"its model_type is not {model_type!r}")
        model = build(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(directory / CONFIG)!r} is not the configuration of an {model_type} model: {error}"
        ) from error
    try:
        state = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(directory / WEIGHTS)!r} is truncated or corrupt: {error}") from error
    compare({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state, f"the model of {CONFIG}")
    adopt_dtype(model, state)
    model.load_state_dict(state)
    return model


def adopt_dtype(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the model of the one floating dtype that `state` has, so that no value is rounded; nothing where it has several."""
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        model.to(floats.pop())


def compare(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError naming the tensors of `state` that are missing, unexpected or of another shape."""
    problems = differences(expected, state)
    if problems:
        raise CheckpointError(f"the checkpoint is not that of {what}; {listed(problems)}", problems)


def differences(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The tensors of `state` that are not as expected, by what is wrong with them; empty when all are."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of the wrong shape": [
            f"{name} {tuple(state[name].shape)}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != tuple(shape)
        ],
    }
    return {kind: names for kind, names in problems.items() if names}


def listed(problems: Mapping[str, list[str]]) -> str:
    """Differences in a line: how many there are of each kind, and the first few of them."""
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}"
        for kind, names in problems.items()
    )
