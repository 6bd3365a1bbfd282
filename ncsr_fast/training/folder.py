"""Checks of a run's folder before anything is written: it belongs to the run, and the run does not read from it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ncsr_fast.data.images import SUFFIXES
from ncsr_fast.data.search import Search, named
from ncsr_fast.places import holds
from ncsr_fast.training.lock import is_lock
from ncsr_fast.training.run import stored_settings
from ncsr_fast.training.settings import TrainSettings

_TEMPORARY = re.compile(r"\.settings\.json\.\w+\.json")  # left with the lock by a start that was killed


def check_folder(settings: TrainSettings, folder: Path) -> None:
    """Check that a run may write to `folder`. Nothing is written.

    Raises:
        ValueError: The folder has other contents than a run's; or the run would train on its own samples, or replace the
            weights that it starts from.
        OSError: The folder cannot be read.
    """
    _check_ours(folder)
    for name in ("start_from", "encoder_weights"):
        weights = getattr(settings, name)
        if weights is not None and os.path.exists(weights) and holds(folder, weights):
            raise ValueError(
                f"{name}: {weights!r} is in the run's folder {str(folder)!r}, to which the run writes its own models; "
                "choose another folder"
            )
    for name, place in _image_places(settings):
        _check_outside(name, Path(place), folder)


def _check_ours(folder: Path) -> None:
    """Raise for a folder with other contents than those of a run or of a start that was killed."""
    if not folder.is_dir() or stored_settings(folder) is not None:
        return
    others = sorted(path.name for path in folder.iterdir() if not is_lock(path) and not _TEMPORARY.fullmatch(path.name))
    if others:
        raise ValueError(
            f"{str(folder)!r} contains {named(others)} and no settings.json, so it is not a run's folder, and a run might "
            "replace its contents; choose a new or empty folder"
        )


def _check_outside(name: str, place: Path, folder: Path) -> None:
    """Raise if the samples of the run would be among its images at the next start."""
    if not place.is_dir():
        return
    for origin in Search(place, SUFFIXES).origins:
        linked = "" if origin == place else f", by way of {str(origin)!r}"
        if holds(origin, folder):
            raise ValueError(
                f"the run's folder {str(folder)!r} is inside {name} {str(place)!r}{linked}, so that its samples would be "
                "trained on when it is resumed; choose another folder"
            )
        if holds(folder, origin):
            raise ValueError(
                f"{name}: {str(place)!r} has images in the run's folder {str(folder)!r}{linked}, and the run would train on "
                "its own samples; choose another folder"
            )


def _image_places(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    for name in ("images", "lr_images"):
        yield from ((name, place) for place in getattr(settings, name))
    for name in ("validation", "validation_lr"):
        if getattr(settings, name) is not None:
            yield name, getattr(settings, name)
