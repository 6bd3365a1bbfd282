"""Tables of GPUs: which backend runs each kernel, and in which tiles, with the provenance of every entry.

A table is a JSON file. An entry says how many times the reference's speed a backend has for a kernel, named as in
`ncsr_fast.ops.backend.COVERAGE`; or in which tiles a Triton kernel runs for a bucket of channels. The package's tables are in
`ncsr_fast/gpus`; `ncsr-fast tune` writes the user's table.

The tables are searched for the entry of a backend in this order: the user's table for this GPU, the package's table for this
GPU, tables for other GPUs of the same compute capability, the table for any GPU. The environment variable NCSR_FAST_TUNING
limits the search:

    strict     only tables for this GPU; a missing entry is an error
    nearest    all tables (the default)
    default    only the package's table for any GPU

The tables are read once per process, when the first operator runs on a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGED = Path(__file__).parent / "gpus"
MODE, USERS = "NCSR_FAST_TUNING", "NCSR_FAST_TUNING_TABLE"  # environment variables: the mode, and the user's table
MODES = ("strict", "nearest", "default")
PREDICTED_GAIN = 1.3  # a kernel that was never measured runs from this predicted gain on
KINDS = (
    "measured",
    "predicted",
    "established",
    "unmeasured",
)  # kinds of provenance; established: in use before there were tables


class TuningMissing(ValueError):
    """In mode "strict", no table for this GPU has an entry; the message says what to do."""


class Gpu(NamedTuple):
    """A GPU: its name in PyTorch, and its compute capability, such as "9.0"."""

    name: str
    capability: str


@dataclass(frozen=True)
class Choice:
    """An entry of a table: a backend for a kernel.

    Attributes:
        kernel: The name of the kernel, as in `COVERAGE`.
        dtype: Dtype of the tensor that decides, such as "bfloat16"; None is any.
        backend: "triton" or "native".
        gain: The reference's time divided by the backend's; None if neither measured nor predicted.
        provenance: `kind`, one of `KINDS`; if "measured" also date, torch, triton and gpu; if "predicted" the cost model and
            its GPU.
    """

    kernel: str
    dtype: str | None
    backend: str
    gain: float | None
    provenance: Mapping[str, str]

    @property
    def used(self) -> bool:
        """True if "auto" may take the backend: measured to be faster, predicted to be much faster, or established."""
        kind = self.provenance["kind"]
        if kind == "measured":
            return self.gain is not None and self.gain > 1
        if kind == "predicted":
            return self.gain is not None and self.gain >= PREDICTED_GAIN
        return kind == "established"


@dataclass(frozen=True)
class Tiles:
    """An entry of a table: the sizes of the tiles of a Triton kernel; `channels` is the largest number of its bucket."""

    kernel: str
    channels: int
    sizes: Mapping[str, int]
    gain: float | None
    provenance: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """The entries of a file; `gpu` and `capability` are None for any GPU."""

    file: Path
    gpu: str | None
    capability: str | None
    backends: tuple[Choice, ...]
    tiles: tuple[Tiles, ...]


# ---- the look-up


def preferred(kernel: str, dtype: str) -> tuple[str, ...]:
    """The backends that the tables prefer to the reference for a kernel on this GPU, the best first.

    Raises:
        TuningMissing: In mode "strict", no table for this GPU has an entry.
        ValueError: A table or the mode is not valid; the message names it.
    """
    found = choices(kernel, dtype)
    if not found and mode() == "strict":
        raise _missing(f"which backend runs {kernel!r} in {dtype}")
    return tuple(choice.backend for choice, _ in found if choice.used)


def choices(kernel: str, dtype: str) -> list[tuple[Choice, Table]]:
    """The entries for a kernel and dtype, one for each backend, with their tables."""
    found: dict[str, tuple[Choice, Table]] = {}
    for table in _tables():
        for choice in table.backends:
            if choice.kernel == kernel and choice.dtype in (None, dtype):
                found.setdefault(choice.backend, (choice, table))
    return list(found.values())


@functools.cache
def tiles(kernel: str, channels: int) -> Mapping[str, int]:
    """The sizes of the tiles of a Triton kernel in the tables of this GPU; empty if the kernel's own sizes hold.

    Raises:
        TuningMissing, ValueError: As `preferred`.
    """
    if (kernel, bucket(channels)) in _tried:
        return _tried[kernel, bucket(channels)]
    entries = [entry for table in _tables() for entry in table.tiles]
    found = next((each.sizes for each in entries if (each.kernel, each.channels) == (kernel, bucket(channels))), None)
    if found is None and mode() == "strict":
        raise _missing(f"the tiles of {kernel!r} for {channels} channels")
    return found or {}


def bucket(channels: int) -> int:
    """The largest number of channels in the bucket of `channels`: the next power of two."""
    return 1 << max(0, channels - 1).bit_length()


def gpu() -> Gpu | None:
    """The current GPU; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(properties.name, f"{properties.major}.{properties.minor}")


def mode() -> str:
    """The mode of the search; raise ValueError for an unknown mode."""
    chosen = os.environ.get(MODE) or "nearest"
    if chosen not in MODES:
        raise ValueError(f"{MODE} must be one of {', '.join(map(repr, MODES))}, not {chosen!r}")
    return chosen


def forget() -> None:
    """Forget the tables, so that they are read again when they are next used."""
    _tables.cache_clear()
    tiles.cache_clear()


@contextmanager
def trying(kernel: str, channels: int, sizes: Mapping[str, int]) -> Iterator[None]:
    """A context in which a Triton kernel runs in tiles of these sizes, whatever the tables say."""
    key = kernel, bucket(channels)
    _tried[key] = sizes
    tiles.cache_clear()
    try:
        yield
    finally:
        del _tried[key]
        tiles.cache_clear()


_tried: dict[tuple[str, int], Mapping[str, int]] = {}


@functools.cache
def _tables() -> tuple[Table, ...]:
    """The tables in the order of the search."""
    packaged, here = _in_folder(PACKAGED), gpu()
    last = [table for table in packaged if table.gpu is None]
    if mode() == "default":
        return tuple(last)
    every = _of_the_user(here) + [table for table in packaged if table.gpu is not None]
    exact = [table for table in every if here is not None and table.gpu == here.name]
    if mode() == "strict":
        return tuple(exact)
    alike = [table for table in every if here is not None and table.capability == here.capability and table.gpu != here.name]
    return (*exact, *alike, *last)


def _missing(what: str) -> TuningMissing:
    here = gpu()
    return TuningMissing(
        f"no table of {here.name if here else 'a GPU'} says {what}, which {MODE}=strict requires: measure it with "
        f"`ncsr-fast tune`, or use {MODE}=nearest"
    )


# ---- the files


def user_folder() -> Path:
    """The folder of the user's tables, which may not exist."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.config").expanduser()) / "ncsr_fast" / "gpus"


def file_name(gpu: str) -> str:
    """The name of the file of a GPU's table."""
    return f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def read(file: Path) -> Table:
    """The table that a file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a table; the message names it.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        entries = [Choice(**entry) for entry in stored["backends"]]
        sizes = [Tiles(**entry) for entry in stored["tiles"]]
        for entry in (*entries, *sizes):
            kind, gain = entry.provenance["kind"], entry.gain
            if kind not in KINDS:
                raise ValueError(f"there is no kind of provenance {kind!r}")
            if kind in ("measured", "predicted") and not isinstance(gain, (int, float)):
                raise ValueError(f"an entry that was {kind} has the gain {gain!r}")
        return Table(file, stored["gpu"], stored["capability"], tuple(entries), tuple(sizes))
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{str(file)!r} is not a table of a GPU: {error}"
        raise ValueError(f"{problem}; write it again with `ncsr-fast tune`, or remove it") from error


def text(table: Table) -> str:
    """The text of a table's file, one entry per line."""
    head = {"gpu": table.gpu, "capability": table.capability}
    lists = {"backends": table.backends, "tiles": table.tiles}
    parts = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    for key, entries in lists.items():
        lines = ",\n".join(f"  {json.dumps(asdict(entry), ensure_ascii=False)}" for entry in entries)
        parts.append(f' "{key}": [\n{lines}\n ]' if lines else f' "{key}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _in_folder(folder: Path) -> list[Table]:
    return [read(file) for file in sorted(folder.glob("*.json"))]


def _of_the_user(here: Gpu | None) -> list[Table]:
    """The user's tables; only the named table if one is named."""
    named = os.environ.get(USERS)
    return [read(Path(named).expanduser())] if named else _in_folder(user_folder())


def described(choice: Choice, table: Table) -> str:
    """An entry's backend, gain and provenance, and the name of its file, in a line."""
    origin = choice.provenance
    said = {
        "measured": f"measured at {choice.gain}× the reference's speed, {origin.get('date')} on {origin.get('gpu')}",
        "predicted": f"predicted at {choice.gain}× the reference's speed, never measured; {PREDICTED_GAIN}× is required",
        "established": origin.get("note", "in use since before there were tables, never measured"),
        "unmeasured": "neither measured nor predicted, so not used",
    }
    return f"{choice.backend}: {said[origin['kind']]} ({table.file.name})"
