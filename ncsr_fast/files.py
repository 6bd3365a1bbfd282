"""Files of models: written atomically, read without executing anything, with errors that describe the file."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.file_kinds import is_safetensors, kind_of, names_in_pickle

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SHIPPED = Path(__file__).parent / "models"
_TEMPORARY = 40  # characters of a file's name in that of its temporary file; the whole name could be too long
_SHOWN = 40  # characters of a value in an error
_FLAGS = ("actnorm_initialized",)  # flags in this package's state dicts
_LISTED = 5  # names of each kind in an error


class CheckpointError(ValueError):
    """A file or state dict does not fit the model: it is corrupt, or has other tensors.

    Args:
        problems: Names of the tensors that are "missing", "unexpected", "of the wrong shape", "not finite" or not weights, by
            kind of problem; the message names the first few.
    """

    def __init__(self, message: str, problems: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A context with a temporary file, which is flushed to disk and renamed to `path` if the block ends without an error.

    An OSError in writing names `path`.
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
    temporary.chmod(0o666 & ~mask)  # mkstemp makes files private
    os.replace(temporary, path)


@contextmanager
def _named_errors(path: Path, temporary: str | None = None) -> Iterator[None]:
    """A context in which system errors name `path`, instead of no file or the temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (temporary is not None and error.filename not in (None, temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; raise OSError if the disk is full, as safetensors' own function does not."""
    from safetensors.torch import save

    path.write_bytes(save(dense(tensors), metadata={"format": "pt"}))


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, as files hold them.

    Raises:
        ValueError: A tensor is on the meta device, and has no values.
    """
    empty = {"without values": [name for name, tensor in tensors.items() if tensor.device.type == "meta"]}
    if any(empty.values()):
        raise ValueError(f"a model on the meta device cannot be written, {listed(empty)}: give the model weights first")
    return {name: tensor.detach().cpu().resolve_neg().contiguous() for name, tensor in tensors.items()}


def write_pickled(path: Path, value: Any) -> None:
    """Write a file as `torch.save` does, but raise OSError if the disk is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def json_value(value: Any) -> Any:
    """`value` with None for each number that is not finite, which JSON cannot hold, also inside mappings and lists."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The names and values in a JSON file; raise OSError, or ValueError for a file with any other content."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"it should be an object of names and values, not {str(values)[:_SHOWN]}")
    return values


def shipped() -> list[str]:
    """The names of the models in the package."""
    return sorted(entry.name for entry in SHIPPED.iterdir() if (entry / WEIGHTS).is_file()) if SHIPPED.is_dir() else []


def save_directory(model: nn.Module, model_type: str, configuration: dict[str, Any], directory: str | os.PathLike) -> Path:
    """Write config.json (`model_type` and the configuration) and model.safetensors to `directory`; return it."""
    directory = Path(directory)
    with atomic_write(directory / WEIGHTS) as path:
        write_tensors(path, model.state_dict())
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps({"model_type": model_type, **configuration}, indent=2) + "\n", encoding="utf-8")
    return directory


def load_directory(directory: Path, model_type: str, build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """The model of a directory written by `save_directory`; `build` makes it from its configuration.

    Raises:
        FileNotFoundError: There is no such directory, or one of its files is missing.
        CheckpointError: The files are corrupt, of another type, or do not fit each other.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{str(directory)!r} has no {name}; {_meant(directory)}")
    try:
        values = read_json(directory / CONFIG)
        if values.pop("model_type", None) != model_type:
            raise ValueError(f"its model_type is not {model_type!r}")
        model = build(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(directory / CONFIG)!r} is not the configuration of an {model_type} model: {error}"
        ) from error
    state = read_checkpoint(directory / WEIGHTS)
    check_weights(state, repr(str(directory / WEIGHTS)))
    compare({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state, f"the model of {CONFIG}")
    adopt_dtype(model, state)
    model.load_state_dict(state)
    return model


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a checkpoint file, on the CPU; nothing in the file is executed.

    A file that begins like the safetensors format is read as such, any other file by `torch.load(…, weights_only=True)`.

    Raises:
        FileNotFoundError: There is no file at the path.
        CheckpointError: The file was not written by PyTorch or safetensors, is damaged, or holds more than tensors. The
            message says what the file is, as far as its bytes show, and what to do.
    """
    name = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {str(name)!r}")
    if os.path.isdir(path):
        raise CheckpointError(f"{str(name)!r} is a folder, not a checkpoint file; {_meant(Path(path))}")
    kind = kind_of(path)
    if kind is not None:
        raise CheckpointError(f"{str(name)!r} is not a readable checkpoint: it is {kind}")
    reader = _read_safetensors if is_safetensors(path) else _read_pickled
    try:
        return reader(path)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of a damaged file the readers raise almost anything
        raise CheckpointError(f"{str(name)!r} is not a readable checkpoint: {_reason(path, error)}") from error


def _read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_pickled(path: str | os.PathLike) -> Any:
    with open(path, "rb") as file:  # given a path, torch.load would read its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """The cause of an error in reading, in one line.

    PyTorch's own message for a refused file advises to let the file run code, so only the name in that message is passed on.
    """
    # torch 2.4 refuses a truncated file with that advice
    cause = error.__context__ if "unexpected EOF" in str(error.__context__) else error
    if not isinstance(cause, pickle.UnpicklingError):
        return f"it is truncated or corrupt ({_line(cause)}): download or save it again"
    refused = re.search(r"(?i)unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error))
    names = [name for name in names_in_pickle(path) if name.partition(".")[0] not in ("torch", "collections")]
    names = [refused[1]] if refused else names
    if names:
        return f"it holds a {names[0]}, which is more than tensors and is not executed; save only the network's state_dict()"
    return "it was not written by torch.save or safetensors, or is corrupt: save the network's state_dict() with torch.save"


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__


def _meant(directory: Path) -> str:
    """Advice what to give instead of a folder that is not a model."""
    if (directory / "model" / CONFIG).is_file():
        return f"give the model in it, {str(directory / 'model')!r}"
    found = sorted(path for path in directory.iterdir() if path.suffix in (".pth", ".pt", ".ckpt", ".safetensors"))
    if found:
        return f"give a checkpoint in it, such as {str(found[0])!r}"
    return "a model directory is written by save_pretrained"


def check_weights(state: Any, where: str) -> None:
    """Raise CheckpointError unless `state` maps names to dense tensors of finite floating-point numbers.

    A model's flags, which are not weights, may be of any type.
    """
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{where} does not hold a state dict (a mapping from names to tensors)")
    odd = [repr(name) for name in state if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"{where} holds tensors under keys that are not texts: {', '.join(odd[:_LISTED])}")
    problems: dict[str, list[str]] = {}
    for name, tensor in state.items():
        kind = None if name in _FLAGS else _kind_of_tensor(tensor)
        if kind is not None:
            problems.setdefault(kind, []).append(name)
    if problems:
        raise CheckpointError(
            f"{where} holds tensors that are not weights, {listed(problems)}; save the network's state_dict() of dense "
            "floating-point tensors",
            problems,
        )
    wrong = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if wrong:
        problems = {"not finite": wrong}
        raise CheckpointError(
            f"{where} has NaN or infinite values, {listed(problems)}: the training that wrote it diverged, or it is damaged; "
            "use an earlier checkpoint",
            problems,
        )


def _kind_of_tensor(tensor: Tensor) -> str | None:
    """The kind of a tensor that is not a weight, in words; None for a dense floating-point tensor with values."""
    if tensor.device.type == "meta":
        return "without values (on the meta device)"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "not dense"
    return None if tensor.is_floating_point() else f"of {str(tensor.dtype).removeprefix('torch.')}"


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch.isfinite has no 8-bit floats
    return bool(torch.isfinite(tensor).all())


def adopt_dtype(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Convert the model to the floating dtype of `state`, so that no value is rounded, unless `state` has several."""
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        model.to(floats.pop())


def compare(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError naming the tensors of `state` that are missing, unexpected or of another shape."""
    problems = differences(expected, state)
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {what}; {listed(problems)}", problems)


def differences(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the tensors of `state` that are not as expected, by kind of problem; empty if all are."""
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
    """Problems in a line: the number of each kind, and the first few names."""
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}"
        for kind, names in problems.items()
    )
