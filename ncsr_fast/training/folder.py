"""The folder of a run before anything is written to it: whose it is, and that it is no place the run reads from."""

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

_TEMPORARY = re.compile(r"\.settings\.json\.\w+\.json")  # which a start that is killed leaves, and the lock


def check_folder(settings: TrainSettings, folder: Path) -> None:
    """Check that a run may write to `folder`. Nothing is written.

    Raises:
        ValueError: The folder holds something and is no run's; or the run would train on its own samples, or replace the
            weights that it begins with.
        OSError: The folder cannot be read.
    """
    _check_ours(folder)
    for name in ("start_from", "encoder_weights"):
        weights = getattr(settings, name)
        if weights is not None and os.path.exists(weights) and holds(folder, weights):
            raise ValueError(
                f"{name}: {weights!r} is in the run's folder {str(folder)!r}, which the run writes its own models to; "
                "choose another folder"
            )
    for name, place in _image_places(settings):
        _check_outside(name, Path(place), folder)


def _check_ours(folder: Path) -> None:
    """Raise for a folder that holds more than a run does, or than a start that was killed leaves."""
    if not folder.is_dir() or stored_settings(folder) is not None:
        return
    others = sorted(path.name for path in folder.iterdir() if not is_lock(path) and not _TEMPORARY.fullmatch(path.name))
    if others:
        raise ValueError(
            f"{str(folder)!r} holds {named(others)} and no settings.json, so that it is no run's folder, and a run might "
            "replace what is in it; choose a folder that is new or empty"
        )


def _check_outside(name: str, place: Path, folder: Path) -> None:
    """Refuse a run whose samples would be among the images at the next start."""
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
                f"{name}: {str(place)!r} has images in the run's folder {str(folder)!r}{linked}, which would be trained on its "
                "own samples; choose another folder"
            )


def _image_places(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    for name in ("images", "lr_images"):
        yield from ((name, place) for place in getattr(settings, name))
    for name in ("validation", "validation_lr"):
        if getattr(settings, name) is not None:
            yield name, getattr(settings, name)
