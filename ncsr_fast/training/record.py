"""RUN/data.json: the record of the images that a run is trained on, compared when the run is resumed."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from ncsr_fast.data.crops import RandomCrops
from ncsr_fast.data.pickled import PickledImage
from ncsr_fast.data.sources import Source
from ncsr_fast.files import atomic_write, read_json

_PART = 64 * 1024  # bytes read at the beginning, the middle and the end of a compressed file
# First bytes of compressed images, with their offset. If a pixel of such an image changes, so do the bytes after it or the
# file's length: a PNG's last bytes hold a checksum of all pixels. Other files are read whole.
_COMPRESSED = (
    (0, b"\x89PNG"),
    (0, b"\xff\xd8\xff"),
    (0, b"RIFF"),
    (0, b"GIF8"),
    (4, b"ftyp"),
    (4, b"jP  "),
    (0, b"\xff\x4f\xff\x51"),
)
_WHOLE = 2**20  # bytes of other files that are read at once
_NAMED = 3  # images of each kind that a message names


def data_record(crops: RandomCrops) -> dict[str, Any]:
    """The record of the images that crops are drawn from, as JSON-ready values.

    "images" is in the order of drawing. An image has name, height, width, bytes and checksum; a pair has these values of both
    images. "left_out" has the reasons by file. Names begin with the number of the place, so a place may move.

    The checksum of a compressed file covers its beginning, middle and end, 64 KiB each, so that a data set is not read whole
    at each start. The checksum of other files (BMP, TIFF, Netpbm, TGA), and of the pixels of an image in a `.pklv4` file,
    covers everything. Times of change are not recorded, because copies have other times.
    """
    images = [[value for source in files for value in _entry(crops, source)] for files in crops.files]
    return {"images": images, "left_out": dict(sorted(crops.broken.items()))}


def changes(path: Path, now: dict[str, Any]) -> str | None:
    """The differences between the images recorded in the file and those of `now`; None without differences or file.

    Raises:
        ValueError: The file is not a record; the message says what to do.
    """
    try:
        before = read_json(path)["images"]
        old, new = ({image[0]: image[1:] for image in images} for images in (before, now["images"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); remove it, and the images are recorded again") from error
    found = (
        ("new", [name for name in new if name not in old]),
        ("gone", [name for name in old if name not in new]),
        ("changed", [name for name in new if name in old and new[name] != old[name]]),
    )
    listed = [f"{len(names)} {kind} ({_some(names)})" for kind, names in found if names]
    if not listed and before != now["images"]:
        listed = ["the same images in another order"]
    return "; ".join(listed) or None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, one image per line."""
    lines = ",\n".join(json.dumps(image) for image in record["images"])
    with atomic_write(path) as temporary:
        temporary.write_text(
            f'{{"images": [\n{lines}\n], "left_out": {json.dumps(record["left_out"], indent=1)}}}\n', encoding="utf-8"
        )


def _entry(crops: RandomCrops, source: Source) -> list[Any]:
    number, place = next((item for item in enumerate(crops.places) if _within(source, item[1])), (0, Path()))
    height, width = crops.sizes[source]
    if isinstance(source, PickledImage):
        pixels = source.read().permute(1, 2, 0).contiguous().numpy()
        return [f"{number}[{source.index}]", height, width, pixels.nbytes, zlib.crc32(pixels)]
    return [f"{number}/{source.relative_to(place).as_posix()}", height, width, *_fingerprint(source)]


def _fingerprint(path: Path) -> tuple[int, int]:
    """A file's length and checksum."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_PART)
        checksum = zlib.crc32(head)
        if any(head.startswith(magic, place) for place, magic in _COMPRESSED):
            for start in (max(_PART, (size - _PART) // 2), max(_PART, size - _PART)):
                file.seek(start)
                checksum = zlib.crc32(file.read(_PART), checksum)
        else:
            while part := file.read(_WHOLE):
                checksum = zlib.crc32(part, checksum)
        return size, checksum


def _within(source: Source, place: Path) -> bool:
    return source.images.path == place if isinstance(source, PickledImage) else source.is_relative_to(place)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
