"""Files and folders by what they are, not by their names: what is written must not be what is read."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path

from ncsr_fast import files

AnyPath = str | os.PathLike


def holds(folder: AnyPath, path: AnyPath) -> bool:
    """True if `path` is the folder or in it, by any name: through links, or in letters of another case where that is one name.

    Neither has to be there.
    """
    key = _key(folder)
    return any(_key(place) == key for place in _upwards(path))


def check_apart(outputs: Mapping[str, Iterable[AnyPath]], inputs: Mapping[str, Iterable[AnyPath]]) -> None:
    """Check that what a command writes replaces nothing that it reads, lies in no folder that it reads, and is written once.

    Args:
        outputs: Files, by what messages call them.
        inputs: Files, and folders of which everything is read, by what messages call them.

    Raises:
        ValueError: Naming the two that are one.
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
    """The files that are read of a model, given as for `from_pretrained`; none of one that is to be downloaded."""
    place = Path(model)
    if not place.exists() and os.fspath(model) in files.shipped():
        place = files.SHIPPED / place
    if place.is_dir():
        return [place / files.CONFIG, place / files.WEIGHTS]
    beside = [place.absolute().parents[1] / "settings.json"] if place.absolute().parent.name == "checkpoints" else []
    return [place, *beside] if place.exists() else []


def _key(path: AnyPath) -> Hashable:
    """Equal for two names of one file or folder."""
    try:
        status = os.stat(path)
    except OSError:  # not there: what some file systems take for the same name
        return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()
    return status.st_dev, status.st_ino


def _upwards(path: AnyPath) -> tuple[Path, ...]:
    real = Path(os.path.realpath(path))
    return real, *real.parents


def _called(name: str, path: str) -> str:
    return f"{name} {path!r}"
