"""Sources of images: folders of files, and published `.pklv4` files."""

from __future__ import annotations

import glob
import os
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from ncsr_fast.data.images import SUFFIXES, image_size, list_images, pair_up, read_image
from ncsr_fast.data.pickled import SUFFIX, PickledImage, PickledImages

Source = Path | PickledImage


def list_sources(
    places: list[Path], lr_places: list[Path], names: tuple[str, str] = ("images", "lr_images")
) -> list[tuple[Source, ...]]:
    """The HR images of all places; with LR places, one for each, the pairs (HR, LR).

    Args:
        places: Folders, searched with their subfolders, and `.pklv4` files.
        lr_places: Places of the LR counterparts, or [].
        names: The names of the two arguments in messages.

    Raises:
        FileNotFoundError: A place does not exist.
        ValueError: A place is neither a folder nor a `.pklv4` file, or contains no image; or HR and LR do not fit together.
    """
    if not places:
        raise ValueError(f"{names[0]} must name at least one folder of HR images or .pklv4 file")
    if lr_places and len(lr_places) != len(places):
        raise ValueError(f"{names[1]} must name one place for each of the {len(places)} of {names[0]}, not {len(lr_places)}")
    for name, found in zip(names, (places, lr_places)):
        for place in found:
            _check_place(name, place)
    listed: list[tuple[Source, ...]] = []
    for place, lr_place in zip_longest(places, lr_places):
        hr, pickled = _sources(place), _is_pickled(place)
        if lr_place is None:
            listed += [(image,) for image in hr]
        elif _is_pickled(lr_place) != pickled:
            raise ValueError(
                f"{names[0]} {str(place)!r} and {names[1]} {str(lr_place)!r} must both be folders, or .pklv4 files"
            )
        elif pickled:
            lr = _sources(lr_place)
            if len(hr) != len(lr):
                raise ValueError(
                    f"{str(place)!r} contains {len(hr)} images and {str(lr_place)!r} {len(lr)}: every image needs a partner"
                )
            listed += zip(hr, lr)
        else:
            listed += pair_up(hr, place, _sources(lr_place), lr_place)
    return listed


def source_size(source: Source) -> tuple[int, int]:
    """(height, width) of an image, for a file from its header. Raises as `image_size` does."""
    return source.size if isinstance(source, PickledImage) else image_size(source)


def read_source(source: Source) -> Tensor:
    """The image as uint8 (3, H, W), a view if it is in a `.pklv4` file. Raises as `read_image` does."""
    return source.read() if isinstance(source, PickledImage) else read_image(source)


def _check_place(name: str, place: Path) -> None:
    """Raise for a place that is neither a folder nor a `.pklv4` file, with advice what to give instead."""
    if place.is_dir() or _is_pickled(place) and place.is_file():
        return
    if not place.exists() and glob.has_magic(str(place)):
        folder = next(parent for parent in place.parents if not glob.has_magic(str(parent)))
        raise ValueError(
            f"{name}: {str(place)!r} is a pattern, and patterns are not expanded; give the folder, {str(folder)!r}: all images "
            "in it and in its subfolders are used"
        )
    if place.suffix.lower() in SUFFIXES and place.is_file():
        raise ValueError(f"{name}: {str(place)!r} is one image; give a folder of images, such as {str(place.parent)!r}")
    if place.exists():
        raise ValueError(f"{name}: {str(place)!r} is neither a folder of images nor a {SUFFIX} file")
    raise FileNotFoundError(
        f"{name}: there is no {str(place)!r}; relative paths are relative to the current folder, {os.getcwd()!r}"
    )


def _is_pickled(place: Path) -> bool:
    return place.suffix.lower() == SUFFIX and not place.is_dir()


def _sources(place: Path) -> list[Source]:
    if not _is_pickled(place):
        return list_images(place)
    images = PickledImages(place)
    return [PickledImage(images, index) for index in range(len(images))]
