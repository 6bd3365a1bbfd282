"""Image files: finding, reading and writing them, through Pillow."""

from __future__ import annotations

import contextlib
import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ncsr_fast.data.search import Search, named
from ncsr_fast.files import atomic_write
from ncsr_fast.metrics.fidelity import to_uint8

# Formats that are read, by Pillow's names, with their suffixes. Other formats of Pillow are left out: EPS and PDF are programs
# to execute, others hold no photographs.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_ORIENTATION, _KIND, _WIDTH, _HEIGHT, _BITS = 274, 254, 256, 257, 258  # tags of TIFF, the first of EXIF too
_GREY = ("PNG", "PPM")  # formats with at most 16-bit grey, for which Pillow's mode is I as for 32-bit integers
_TAGS = ("", "x4", "x8")  # what an LR image's name appends to the HR image's
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow looks for an orientation


class ImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files in `folder` and its subfolders, sorted by path; their names end as in `FORMATS`.

    Links are followed. A file that several links lead to is listed once, by its own path if that is in `folder`. A warning
    names everything that is left out: files of other formats, hidden files (whose names begin with a dot, such as copies made
    by macOS and remains of interrupted writes), broken links, and links to files that are already listed.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: `folder` is a file.
        ValueError: `folder` contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{str(folder)!r} is a file; give the folder that contains it")
        hint = "; patterns are not expanded here: give the folder" if glob.has_magic(str(folder)) else ""
        raise FileNotFoundError(f"no folder {str(folder)!r}{hint}")
    search = Search(folder, SUFFIXES)
    if not search.found:
        others = f"; in it: {search.account()}" if search.left_out else ""
        raise ValueError(f"{str(folder)!r} contains no image ({', '.join(SUFFIXES)}){others}")
    if search.left_out:
        count = sum(map(len, search.left_out.values()))
        warnings.warn(f"{count} entries of {str(folder)!r} are left out: {search.account()}", stacklevel=2)
    return sorted(search.found)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of an image as `read_image` returns it, from its header. Raises as `read_image` does."""
    with _named_errors(path), _opened(path) as image:
        return _size(image)


def read_image(path: str | os.PathLike) -> Tensor:
    """An image as uint8 RGB (3, H, W).

    Grey, palette and CMYK images become RGB, EXIF orientation is applied, and an alpha channel is dropped, as the published
    programs' reader does. Grey of 10, 12 or 16 bits is rounded to 8 bits; of 16-bit colour Pillow returns the upper 8 bits.
    The format, one of `FORMATS`, is recognised by content, not by name.

    Raises:
        FileNotFoundError: There is no such file.
        ImageError: The file is truncated, corrupt or not an image, or holds what does not fit 8-bit RGB: several pictures,
            floats, or 32-bit integers. From a phone's MPO the first picture is taken, from a TIFF with thumbnails the other.
        MemoryError: The image is too large.
    """
    with _named_errors(path), _opened(path) as image:
        _check_single(image)
        _check_range(image)
        highest = _highest(image)
        image.load()
        return torch.from_numpy(_pixels(ImageOps.exif_transpose(image), highest))


def is_cut_png(path: str | os.PathLike) -> bool:
    """True for a PNG that ends before its last chunk."""
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return False
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # the chunk and its checksum
        return len(head) < 8


def write_image(path: str | os.PathLike, image: Tensor, to_8bit: str = "round") -> None:
    """Write (3, H, W), uint8 or float in [0, 1] (clipped, and made 8 bits as `to_uint8` does by `to_8bit`), atomically."""
    array = to_uint8(image, to_8bit).cpu().permute(1, 2, 0).numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary)


def to_float(images: Tensor) -> Tensor:
    """The images in float32 in [0, 1], from uint8."""
    return images.float().div(255)


def crop_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """The top left part of (…, H, W) whose sides are multiples of `multiple` (`modcrop` of MATLAB scripts)."""
    height, width = (side - side % multiple for side in image.shape[-2:])
    return image[..., :height, :width]


def pair_up(hr: Iterable[Path], hr_root: Path, lr: Iterable[Path], lr_root: Path) -> list[tuple[Path, Path]]:
    """HR and LR files of the same relative path, suffix aside.

    DIV2K's `0001x4.png` matches `0001.png` too, and `low00001.png` of LOL-v2 matches `normal00001.png`.

    A warning names LR files without an HR partner.

    Raises:
        ValueError: HR files have no partner, or two files would match the same image; the message names them.
    """
    hr_by_key, lr_by_key = _by_key(hr, hr_root), _by_key(lr, lr_root)
    pairs, alone, partners = [], [], set()
    for key, path in hr_by_key.items():
        found = [name for name in _lr_keys(key) if name in lr_by_key]
        if len(found) > 1:
            both = " and ".join(repr(str(lr_by_key[name])) for name in found[:2])
            raise ValueError(f"{both} would both be the LR image of {str(path)!r}; remove one of them")
        if found:
            pairs.append((path, lr_by_key[found[0]]))
            partners.add(found[0])
        else:
            alone.append(path)
    if alone:
        raise ValueError(f"{len(alone)} HR images have no LR partner in {str(lr_root)!r}: {named(map(str, alone))}")
    others = [str(path) for key, path in lr_by_key.items() if key not in partners]
    if others:
        warnings.warn(f"{len(others)} LR images have no HR partner in {str(hr_root)!r}: {named(others)}", stacklevel=2)
    return pairs


def originals_of(names: Sequence[str], folder: str | os.PathLike) -> list[Path]:
    """The original of each LR image in a folder of originals, by the names that `pair_up` pairs.

    Args:
        names: Paths of the LR images in their folder, without the suffix.
        folder: Searched with its subfolders; originals of no LR image are passed over.

    Raises:
        ValueError: LR images have no original; the message names them. And as `list_images`.
    """
    partners: dict[str, Path] = {}
    for key, path in _by_key(list_images(folder), Path(folder)).items():
        for name in _lr_keys(key):
            if name == key or name not in partners:  # the same name comes before one with a tag
                partners[name] = path
    alone = [name for name in names if name not in partners]
    if alone:
        raise ValueError(f"{len(alone)} LR images have no original in {str(folder)!r}: {named(alone)}")
    return [partners[name] for name in names]


def _lr_keys(key: str) -> list[str]:
    """The relative paths without suffix that the LR file of an HR file may have."""
    folder, name = os.path.split(key)
    low = [os.path.join(folder, "low" + name.removeprefix("normal"))] if name.startswith("normal") else []
    return [key + tag for tag in _TAGS] + low


def _by_key(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    """The files by relative path without the suffix."""
    found: dict[str, Path] = {}
    for path in paths:
        key = str(path.relative_to(root).with_suffix(""))
        if key in found:
            raise ValueError(
                f"{str(found[key])!r} and {str(path)!r} would both be the image {key!r} of a pair; remove one of them"
            )
        found[key] = path
    return found


def _opened(path: str | os.PathLike) -> Image.Image:
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])  # AVIF from Pillow 11.3 on


def _size(image: Image.Image) -> tuple[int, int]:
    """(height, width) once the orientation is applied; orientations 5 to 8 swap the axes."""
    if image.format == "TIFF":  # whether `size` includes the orientation depends on the version of Pillow
        (width, height), orientation = (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]), image.tag_v2.get(_ORIENTATION, 1)
    else:
        # Pillow would decode a whole PNG without metadata to look for them
        told = any(key in image.info for key in _METADATA)
        (width, height), orientation = image.size, image.getexif().get(_ORIENTATION, 1) if told else 1
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _check_single(image: Image.Image) -> None:
    """Raise ValueError for animations and several pages; smaller copies in a TIFF do not count as pages."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == "MPO":
        return
    if image.format == "TIFF":
        kinds = []
        for number in range(count):
            image.seek(number)
            kinds.append(image.tag_v2.get(_KIND, 0) & 1)
        image.seek(0)
        count = 1 if sum(kinds) == count - 1 and not kinds[0] else count
    if count > 1:
        raise ValueError(f"it contains {count} pictures; save the one you want in a file of its own")


def _check_range(image: Image.Image) -> None:
    """Raise ValueError for pixel types whose value of white the file does not define."""
    kind = "floats" if image.mode == "F" else None
    if image.mode == "I" and image.format not in _GREY:
        bits, *_ = image.tag_v2.get(_BITS, (32,)) if image.format == "TIFF" else (32,)
        kind = f"{'signed ' * (bits == 16)}{bits}-bit integers"
    if kind is not None:
        raise ValueError(f"its pixels are {kind} of unknown range; save it with 8 bits, or 16 without a sign")


def _highest(image: Image.Image) -> int:
    """The value of white in a grey image with more than 8 bits; Pillow scales all but TIFF to 16 bits."""
    bits, *_ = image.tag_v2.get(_BITS, (16,)) if image.format == "TIFF" else (16,)
    return 2**bits - 1


def _pixels(image: Image.Image, highest: int) -> np.ndarray:
    """The pixels as uint8 (3, H, W)."""
    if image.mode.startswith("I"):  # grey with more than 8 bits; Pillow's own conversion clips it
        grey = np.asarray(image, dtype=np.float64) / (highest / 255)
        array = np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)
    else:
        array = np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))[..., :3]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


@contextlib.contextmanager
def _named_errors(path: str | os.PathLike) -> Iterator[None]:
    """A context in which errors of decoding are raised as an ImageError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # almost any
        cut = isinstance(error, (MemoryError, Image.DecompressionBombError)) and is_cut_png(path)
        if isinstance(error, MemoryError) and not cut:
            raise
        raise _image_error(path, error, cut) from error


def _image_error(path: str | os.PathLike, error: Exception, cut: bool) -> ImageError:
    if cut:
        reason = "it is truncated, and its header asks for more pixels than fit; copy or download it again"
    elif isinstance(error, UnidentifiedImageError):
        reason = f"it is not an image, or its format is not one of {', '.join(FORMATS)}"
    elif isinstance(error, Image.DecompressionBombError):
        reason = f"{error}; cut it into parts, or raise PIL.Image.MAX_IMAGE_PIXELS"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ImageError(f"cannot read image {os.fspath(path)!r}: {' '.join(reason.split())}")
