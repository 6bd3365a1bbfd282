"""Models from one kind of file to another: published checkpoints, and the directories of `save_pretrained`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ncsr_fast import files
from ncsr_fast.config import NCSRConfig
from ncsr_fast.hub import find_model
from ncsr_fast.nn import published
from ncsr_fast.nn.checkpoints import is_own
from ncsr_fast.nn.encoder import RRDB
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.nn.state_dicts import read_named

_SAFETENSORS = ".safetensors"
FILE_SUFFIXES = (".pth", ".pt", _SAFETENSORS)  # what a published file ends with; anything else is a directory


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    source: Path
    out: Path
    model: str  # in a few words
    tensors: list[tuple[str | None, str | None]]  # name in the source and in `out`; None: it is not there

    @property
    def renamed(self) -> list[tuple[str, str]]:
        return [(old, new) for old, new in self.tensors if old and new and old != new]

    @property
    def dropped(self) -> list[str]:
        """Tensors that no computation uses, and a directory has no place for."""
        return [old for old, new in self.tensors if old and not new]

    @property
    def zeros(self) -> list[str]:
        """Tensors that no computation uses, and published files have nevertheless."""
        return [new for old, new in self.tensors if new and not old]

    def summary(self) -> str:
        """A line of numbers."""
        kept = len(self.tensors) - len(self.renamed) - len(self.dropped) - len(self.zeros)
        parts = [f"{kept} tensors of the same name", f"{len(self.renamed)} renamed"]
        parts += [f"{len(self.dropped)} dropped, which no computation uses"] if self.dropped else []
        parts += [f"{len(self.zeros)} zero, which no computation uses"] if self.zeros else []
        return f"{self.model}: {', '.join(parts)}"

    def report(self) -> str:
        """A line for each tensor."""
        return "\n".join(f"{old or '(zeros)'} → {new or '(dropped)'}" for old, new in self.tensors)


def convert(source: str | os.PathLike, out: str | os.PathLike, config: NCSRConfig | None = None) -> Conversion:
    """Write the model `source` to `out`, in the kind of file that the name of `out` asks for. Values are not changed.

    source  whatever `NCSR.from_pretrained` or `RRDB.from_pretrained` reads: a flow or a generator, a published .pth or
            .safetensors in any naming and wrapping, a checkpoint of `ncsr-fast train`, a directory, a name
    out     NAME.pth or NAME.pt: a published file, as the published programs load it; NAME.safetensors: the same tensors under
            the same names; any other name: a directory of config.json and model.safetensors, as `from_pretrained` and the
            Hugging Face Hub have it. Generators get the names of SRFlow, NCSR and ESRGAN's new architecture.
    config  of a flow in a file; None finds it as `NCSR.from_pretrained` does

    Each file is written to a temporary name and renamed. What is there before is replaced.

    raises  as `from_pretrained`, before anything is written. The `problems` of a CheckpointError are every tensor that is
            missing, unexpected or of the wrong shape.
    """
    path, out = find_model(source), Path(out)
    if out.exists() and out.samefile(path):
        raise ValueError(f"out is the source itself, {str(path)!r}")
    model, names = _read(path, config)
    with torch.no_grad():
        published_out = _write(model, out)
    return Conversion(path, out, model.describe(), _rows(model, names, published_out))


def _read(path: Path, config: NCSRConfig | None) -> tuple[NCSR | RRDB, dict[str, str] | None]:
    """The model, and of a published file the names in it, by the published names in full."""
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config belongs to a file; {str(path)!r} is a directory with its own {files.CONFIG}")
        kind = NCSR if _model_type(path) == "ncsr" else RRDB
        return kind.from_pretrained(path), None
    named = read_named(path)
    if is_own(named.tensors) or any(name.startswith("flowUpsamplerNet.") for name in named.tensors):
        model = NCSR.from_state_dict(named.tensors, path, config)
        return model, None if is_own(named.tensors) else named.names
    if config is not None:
        raise ValueError(f"config belongs to a flow; {str(path)!r} is a generator")
    state, names = published.read_named_encoder(path)
    return RRDB.from_state_dict(state), names


def _model_type(directory: Path) -> str | None:
    try:
        return json.loads((directory / files.CONFIG).read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return "ncsr"  # whose reader says what is wrong with it


def _write(model: NCSR | RRDB, out: Path) -> bool:
    """Whether it has the published names."""
    if out.suffix not in FILE_SUFFIXES:
        model.save_pretrained(out)
        return False
    state = {name: tensor.cpu().contiguous() for name, tensor in model.published_state_dict().items()}
    with files.atomic_write(out) as path:
        (files.write_tensors if out.suffix == _SAFETENSORS else files.write_pickled)(path, state)
    return True


def _rows(model: NCSR | RRDB, names: dict[str, str] | None, published_out: bool) -> list[tuple[str | None, str | None]]:
    if isinstance(model, NCSR):
        places = published.places(model)
    else:
        places = dict(zip((name for name, _ in published.encoder_layout(model)), model.state_dict()))
    rows = [(place if names is None else names[name], name if published_out else place) for name, place in places.items()]
    return [row for row in rows if any(row)]
