"""Image files: finding, reading and writing them, through Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ncsr_fast.files import atomic_write
from ncsr_fast.metrics.fidelity import to_uint8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files (png, jpg, jpeg, webp, bmp) in `folder` and below, sorted by path.

    raises  FileNotFoundError when there is no such folder, ValueError when it holds no image
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no image ({', '.join(SUFFIXES)})")
    return paths


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of an image as `read_image` returns it, from its header. Raises ImageError."""
    try:
        with Image.open(path) as image:
            # a PNG without the chunk would be decoded whole in search of it; orientations 5-8 swap the axes
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
            return image.size if turned else image.size[::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _image_error(path, error) from error


def read_image(path: str | os.PathLike) -> Tensor:
    """An image as uint8 RGB (3, H, W).

    Grey and palette images become RGB, 16 bits are rounded to 8, EXIF orientation is applied, and an alpha
    channel is dropped, as the published programs' reader does.
    raises  FileNotFoundError; ImageError, naming the file, when it is truncated, corrupt or no image
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it
                grey = np.asarray(image, dtype=np.float64) / 257
                array = np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            else:
                array = np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))[..., :3]
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _image_error(path, error) from error
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def write_image(path: str | os.PathLike, image: Tensor) -> None:
    """Write (3, H, W), uint8 or float in [0, 1] (clipped and rounded to 8 bits), atomically."""
    array = to_uint8(image).cpu().permute(1, 2, 0).numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary)


def to_float(images: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1]."""
    return images.float().div(255)


def crop_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """The top left of (…, H, W) whose sides are multiples of `multiple` (MATLAB scripts' `modcrop`)."""
    height, width = (side - side % multiple for side in image.shape[-2:])
    return image[..., :height, :width]


def pair_up(hr: Iterable[Path], hr_root: Path, lr: Iterable[Path], lr_root: Path) -> list[tuple[Path, Path]]:
    """HR and LR files of the same relative path, suffix aside. DIV2K's `0001x4.png` matches `0001.png`.

    raises  ValueError naming the first files that have no partner, or two files that differ in nothing but the suffix
    """
    lr_by_key, pairs, alone = _by_stem(lr, lr_root), [], []
    for name, path in _by_stem(hr, hr_root).items():
        partner = next((lr_by_key[name + tag] for tag in ("", "x4", "x8") if name + tag in lr_by_key), None)
        if partner is None:
            alone.append(path)
        else:
            pairs.append((path, partner))
    if alone:
        raise ValueError(f"{len(alone)} HR images have no LR partner in {str(lr_root)!r}: {', '.join(map(str, alone[:3]))}")
    return pairs


def _by_stem(paths: Iterable[Path], root: Path) -> dict[str, Path]:
    """The files by their path below `root` without the suffix. Raises ValueError where two have the same."""
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(str(path.relative_to(root).with_suffix("")), path)
        if other is not path:
            raise ValueError(
                f"{str(other)!r} and {str(path)!r} differ in nothing but the suffix, and a partner could be that of either; "
                "remove one"
            )
    return found


def _image_error(path: str | os.PathLike, error: Exception) -> ImageError:
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
    return ImageError(f"cannot read image {os.fspath(path)!r}: {reason}")
