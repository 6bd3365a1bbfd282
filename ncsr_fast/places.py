"""Identity of files and folders, whatever their names: a command must not write what it reads."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

from ncsr_fast import files

AnyPath = str | os.PathLike


def holds(folder: AnyPath, path: AnyPath) -> bool:
    """True if `path` is the folder or in it, also by another name: through links, or in other case where case is ignored.

    Neither of the two has to exist.
    """
    key = _key(folder)
    return any(_key(place) == key for place in _upwards(path))


def check_apart(outputs: Mapping[str, Iterable[AnyPath]], inputs: Mapping[str, Iterable[AnyPath]]) -> None:
    """Check that a command's outputs replace none of its inputs or each other, and are in no folder that it reads.

    Args:
        outputs: Files, by their names in messages.
        inputs: Files, and folders that are read as a whole, by their names in messages.

    Raises:
        ValueError: Two of them are the same; the message names both.
    """
    read = {_key(path): (name, os.fspath(path)) for name, paths in inputs.items() for path in paths}
    written: dict[Hashable, tuple[str, str]] = {}
    inside: dict[Path, tuple[str, str] | None] = {}
    for name, paths in outputs.items():
        for path in map(Path, paths):
            key = _key(path)
            if key in read:
                raise ValueError(
                    f"{name}: {str(path)!r} would replace {_called(*read[key])}, which is read; choose another file"
                )
            if key in written:
                raise ValueError(f"{name}: {str(path)!r} would replace {_called(*written[key])}; choose another file")
            written[key] = name, str(path)
            folder = Path(os.path.realpath(path)).parent
            if folder not in inside:
                inside[folder] = next((read[key] for key in map(_key, _upwards(folder)) if key in read), None)
            if inside[folder] is not None:
                raise ValueError(
                    f"{name}: {str(path)!r} would be in {_called(*inside[folder])}, all of which is read; choose another place"
                )


def files_of_model(model: AnyPath) -> list[Path]:
    """The files of a model given as for `from_pretrained`; none if it is to be downloaded."""
    place = Path(model)
    if not place.exists() and os.fspath(model) in files.shipped():
        place = files.SHIPPED / place
    if place.is_dir():
        return [place / files.CONFIG, place / files.WEIGHTS]
    beside = [place.absolute().parents[1] / "settings.json"] if place.absolute().parent.name == "checkpoints" else []
    return [place, *beside] if place.exists() else []


def _key(path: AnyPath) -> Hashable:
    """A key that is equal for two names of one file or folder."""
    try:
        status = os.stat(path)
    except OSError:  # it does not exist: compare names as some file systems do
        return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()
    return status.st_dev, status.st_ino


def _upwards(path: AnyPath) -> tuple[Path, ...]:
    real = Path(os.path.realpath(path))
    return real, *real.parents


def _called(name: str, path: str) -> str:
    return f"{name} {path!r}"
