"""Conversion of models between published checkpoints and directories of `save_pretrained`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ncsr_fast import files
from ncsr_fast.checkpoints import models, published
from ncsr_fast.checkpoints.state_dicts import read_named
from ncsr_fast.config import NCSRConfig
from ncsr_fast.encoder import checkpoints as rrdb_files
from ncsr_fast.encoder import names as rrdb_names
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.hub import find_model
from ncsr_fast.model import NCSR
from ncsr_fast.places import check_apart, files_of_model

_SAFETENSORS = ".safetensors"
FILE_SUFFIXES = (".pth", ".pt", _SAFETENSORS)  # suffixes of published files; any other name is a directory


@dataclass(frozen=True)
class Conversion:
    """Result of `convert`."""

    source: Path
    out: Path
    model: str  # description in a few words
    tensors: list[tuple[str | None, str | None]]  # name in the source and in `out`; None: not there

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """The old and new names of tensors whose names differ."""
        return [(old, new) for old, new in self.tensors if old and new and old != new]

    @property
    def dropped(self) -> list[str]:
        """The tensors that no computation uses, and that are not written to a directory."""
        return [old for old, new in self.tensors if old and not new]

    @property
    def zeros(self) -> list[str]:
        """The tensors that no computation uses, but that published files contain."""
        return [new for old, new in self.tensors if new and not old]

    def summary(self) -> str:
        """A summary of the conversion in one line."""
        kept = len(self.tensors) - len(self.renamed) - len(self.dropped) - len(self.zeros)
        parts = [f"{kept} tensors of the same name", f"{len(self.renamed)} renamed"]
        parts += [f"{len(self.dropped)} dropped, which no computation uses"] if self.dropped else []
        parts += [f"{len(self.zeros)} zero, which no computation uses"] if self.zeros else []
        return f"{self.model}: {', '.join(parts)}"

    def report(self) -> str:
        """A report with one line for each tensor."""
        return "\n".join(f"{old or '(zeros)'} → {new or '(dropped)'}" for old, new in self.tensors)


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    config: NCSRConfig | None = None,
    *,
    long_skip: str | None = None,
) -> Conversion:
    """Write the model `source` to `out`, in the kind of file given by the name of `out`, without changing values.

    Each file is written under a temporary name and renamed. Existing files are replaced.

    Args:
        source: Anything that `NCSR.from_pretrained` or `RRDB.from_pretrained` reads: a flow or a generator, a published .pth or
            .safetensors in any naming and wrapping, a checkpoint of `ncsr-fast train`, a directory, a name.
        out: NAME.pth or NAME.pt: a published file, as the published programs load it; NAME.safetensors: the same tensors
            under the same names; any other name: a directory of config.json and model.safetensors, as `from_pretrained` and
            the Hugging Face Hub read it. Generators get the names of SRFlow, NCSR and ESRGAN's new architecture; ESRGAN+ gets
            its own names, and a generator with a pixel unshuffle BasicSR's. A directory records where a generator's long skip
            starts; a file cannot, and is read as "conv_first" unless `RRDB.from_pretrained` is told otherwise.
        config: Configuration of a flow in a file; None finds it as `NCSR.from_pretrained` does.
        long_skip: Long skip of a generator, as for `RRDB.from_pretrained`: "last_block" for the RRDB files of SRFlow and NCSR.

    Raises:
        ValueError: A file would be both read and written; and as for `from_pretrained`, before anything is written. The
            `problems` of a CheckpointError are all tensors that are missing, unexpected or of the wrong shape.
    """
    path, out = find_model(source), Path(out)
    check_apart({"out": written_files(out)}, {"the source": files_of_model(path)})
    model, names = read_model(path, config, long_skip)
    with torch.no_grad():
        wrapper = _write(model, out)
    described = model.describe() + (f", long skip from {model.long_skip}" if isinstance(model, RRDB) else "")
    return Conversion(path, out, described, _rows(model, names, wrapper))


def written_files(out: Path) -> list[Path]:
    """The files that `convert` writes to `out`."""
    return [out] if out.suffix in FILE_SUFFIXES else [out / files.CONFIG, out / files.WEIGHTS]


def read_model(path: Path, config: NCSRConfig | None, long_skip: str | None) -> tuple[NCSR | RRDB, dict[str, str] | None]:
    """The model, and for a published file its names, by full published names (for a generator by SRFlow's names)."""
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config belongs to a file; {str(path)!r} is a directory with its own {files.CONFIG}")
        if _model_type(path) == "ncsr":
            _refuse_long_skip(path, long_skip)
            return NCSR.from_pretrained(path), None
        return RRDB.from_pretrained(path, long_skip=long_skip), None
    named = read_named(path)
    if models.is_own(named.tensors) or any(name.startswith("flowUpsamplerNet.") for name in named.tensors):
        _refuse_long_skip(path, long_skip)
        model = models.model_of_state_dict(NCSR, named.tensors, path, config)
        return model, None if models.is_own(named.tensors) else named.names
    if config is not None:
        raise ValueError(f"config belongs to a flow; {str(path)!r} is a generator")
    state = rrdb_names.generator_state(named)
    return rrdb_files.from_state(RRDB, state, long_skip), state.names


def _refuse_long_skip(path: Path, long_skip: str | None) -> None:
    if long_skip is not None:
        raise ValueError(f"long_skip belongs to a generator; {str(path)!r} is a flow")


def _model_type(directory: Path) -> str | None:
    try:
        return files.read_json(directory / files.CONFIG).get("model_type")
    except (OSError, ValueError):
        return "ncsr"  # its reader raises a better error


def _write(model: NCSR | RRDB, out: Path) -> str | None:
    """Write the model; return the prefix of the published names, "" for none, None for names of this package."""
    if out.suffix not in FILE_SUFFIXES:
        model.save_pretrained(out)
        return None
    state = {name: tensor.cpu().contiguous() for name, tensor in model.published_state_dict().items()}
    # only BasicSR has generators with a pixel unshuffle, and its programs read this key
    wrapper = "params" if isinstance(model, RRDB) and model.unshuffle > 1 and out.suffix != _SAFETENSORS else ""
    with files.atomic_write(out) as path:
        if out.suffix == _SAFETENSORS:
            files.write_tensors(path, state)
        else:
            files.write_pickled(path, {wrapper: state} if wrapper else state)
    return wrapper


def _rows(model: NCSR | RRDB, names: dict[str, str] | None, wrapper: str | None) -> list[tuple[str | None, str | None]]:
    """The name in the source and the written name, for every tensor."""
    if isinstance(model, NCSR):
        places = published.places(model)
        written = {name: name for name in places}
    else:
        layout = [entry.name for entry in rrdb_names.encoder_layout(model)]
        places = dict(zip(layout, model.state_dict()))
        written = dict(zip(layout, model.published_state_dict()))
    prefix = f"{wrapper}/" if wrapper else ""
    rows = [
        (place if names is None else names[name], place if wrapper is None else prefix + written[name])
        for name, place in places.items()
    ]
    return [row for row in rows if any(row)]
