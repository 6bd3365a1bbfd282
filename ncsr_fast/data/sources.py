"""Where images come from: folders of files, and published `.pklv4` files."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from ncsr_fast.data.images import image_size, list_images, pair_up, read_image
from ncsr_fast.data.pickled import SUFFIX, PickledImage, PickledImages

Source = Path | PickledImage


def list_sources(places: list[Path], lr_places: list[Path]) -> list[tuple[Source, ...]]:
    """The HR images of all places, or where there are LR places, one for each, the pairs (HR, LR).

    raises  FileNotFoundError, ValueError for places that hold no image, or HR and LR that do not fit together
    """
    if not places:
        raise ValueError("images must name at least one folder of HR images or .pklv4 file")
    if lr_places and len(lr_places) != len(places):
        raise ValueError(f"lr_images must name one place for each of the {len(places)} of images, not {len(lr_places)}")
    listed: list[tuple[Source, ...]] = []
    for place, lr_place in zip_longest(places, lr_places):
        hr, pickled = _sources(place), _is_pickled(place)
        if lr_place is None:
            listed += [(image,) for image in hr]
        elif _is_pickled(lr_place) != pickled:
            raise ValueError(f"images {str(place)!r} and lr_images {str(lr_place)!r} must both be folders, or .pklv4 files")
        elif pickled:
            lr = _sources(lr_place)
            if len(hr) != len(lr):
                raise ValueError(f"{str(place)!r} holds {len(hr)} images and {str(lr_place)!r} {len(lr)}: they must be pairs")
            listed += zip(hr, lr)
        else:
            listed += pair_up(hr, place, _sources(lr_place), lr_place)
    return listed


def source_size(source: Source) -> tuple[int, int]:
    """(height, width), of a file from its header. Raises what `image_size` does."""
    return source.size if isinstance(source, PickledImage) else image_size(source)


def read_source(source: Source) -> Tensor:
    """uint8 (3, H, W), of an image in a `.pklv4` a view. Raises what `read_image` does."""
    return source.read() if isinstance(source, PickledImage) else read_image(source)


def _is_pickled(place: Path) -> bool:
    return place.suffix.lower() == SUFFIX and not place.is_dir()


def _sources(place: Path) -> list[Source]:
    if not _is_pickled(place):
        return list_images(place)
    images = PickledImages(place)
    return [PickledImage(images, index) for index in range(len(images))]
