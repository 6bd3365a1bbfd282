"""Files of models: written atomically, read without executing anything, and what is wrong with one said in full."""

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
_TEMPORARY = 40  # characters of a name that a temporary file has too; all of a long one, and more, would be too many
_SHOWN = 40  # characters of a value that an error shows
_FLAGS = ("actnorm_initialized",)  # of our state dicts
_LISTED = 5  # names an error spells out of each kind


class CheckpointError(ValueError):
    """A file or state dict that is not the model's: corrupt, or with other tensors.

    Args:
        problems: All tensors that are "missing", "unexpected", "of the wrong shape", "not finite" or of another kind than
            weights are, of which the message has the first few.
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

    path.write_bytes(save(dense(tensors), metadata={"format": "pt"}))


def dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, one after the other in memory, as files hold them.

    Raises:
        ValueError: Tensors are on the meta device, which has no values.
    """
    empty = {"without values": [name for name, tensor in tensors.items() if tensor.device.type == "meta"]}
    if any(empty.values()):
        raise ValueError(f"a model on the meta device cannot be written, {listed(empty)}: give the model weights first")
    return {name: tensor.detach().cpu().resolve_neg().contiguous() for name, tensor in tensors.items()}


def write_pickled(path: Path, value: Any) -> None:
    """Write a file as `torch.save` does. Raises OSError when the disk is full, where that raises an error of its insides."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def json_value(value: Any) -> Any:
    """`value` with None for each number that is not finite, which JSON does not have; mappings and lists are gone through."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The names and values in a JSON file. Raises OSError, or ValueError for a file that holds anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its lists or objects are too deep in one another") from error
    if not isinstance(values, dict):
        raise ValueError(f"it should be an object of names and values, not {str(values)[:_SHOWN]}")
    return values


def shipped() -> list[str]:
    """Names of the models that come with the package."""
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
        FileNotFoundError: There is no such directory, or a file of it is missing.
        CheckpointError: Files that are corrupt, of another type, or do not fit each other.
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

    A file that begins as the safetensors format does is read as such, any other by `torch.load(…, weights_only=True)`.

    Raises:
        FileNotFoundError: There is nothing at the path.
        CheckpointError: The file is none that PyTorch or safetensors wrote, is damaged, or holds more than tensors. The
            message says what it is, as far as its bytes tell, and what to do.
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
    with open(path, "rb") as file:  # of a path torch.load would look at the suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """The cause in one line.

    PyTorch's own message for a refused file advises to let the file run code, so only the name in that message is passed on.
    """
    # of a file that ends early torch 2.4 makes a refusal, with that advice
    cause = error.__context__ if "unexpected EOF" in str(error.__context__) else error
    if not isinstance(cause, pickle.UnpicklingError):
        return f"it is truncated or corrupt ({_line(cause)}): download or save it again"
    refused = re.search(r"(?i)unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error))
    names = [name for name in names_in_pickle(path) if name.partition(".")[0] not in ("torch", "collections")]
    names = [refused[1]] if refused else names
    if names:
        return f"it holds a {names[0]}, which is more than tensors and is not run; save the network's state_dict() alone"
    return "it was not written by torch.save or safetensors, or is corrupt: save the network's state_dict() by torch.save"


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__


def _meant(directory: Path) -> str:
    """Advice on what to give instead of a folder that is no model."""
    if (directory / "model" / CONFIG).is_file():
        return f"give the model in it, {str(directory / 'model')!r}"
    found = sorted(path for path in directory.iterdir() if path.suffix in (".pth", ".pt", ".ckpt", ".safetensors"))
    if found:
        return f"give a checkpoint in it, as {str(found[0])!r}"
    return "a model directory is written by save_pretrained"


def check_weights(state: Any, where: str) -> None:
    """Raise CheckpointError unless `state` is a mapping from names to tensors of finite floating-point numbers, all there.

    A model's flags, which are no weights, may be of any type.
    """
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{where} holds no state dict (a mapping from names to tensors)")
    odd = [repr(name) for name in state if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"{where} holds tensors under {', '.join(odd[:_LISTED])}, which is no name: names are texts")
    problems: dict[str, list[str]] = {}
    for name, tensor in state.items():
        kind = None if name in _FLAGS else _kind_of_tensor(tensor)
        if kind is not None:
            problems.setdefault(kind, []).append(name)
    if problems:
        raise CheckpointError(
            f"{where} holds tensors that are no weights, {listed(problems)}; save the network's state_dict() of dense "
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
    """The kind of a tensor that is no weight, in words; None for a dense floating-point one with values."""
    if tensor.device.type == "meta":
        return "without values (of the meta device)"
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
