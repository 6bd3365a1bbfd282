"""Published `.pklv4` files, which are pickled lists of images, read without letting the file call anything.

Unpickling calls whatever a file names. Here, classes of this module stand for the few names that a pickled array needs, and
only record their arguments; every other name is refused. Not even numpy receives arguments from the file.
"""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsr_fast.data.images import ImageError

SUFFIX = ".pklv4"


class PickleRefused(ImageError):
    """A pickle names a function or class that a list of images does not need; the message says which."""


class PickledImages:
    """The images of a `.pklv4` file: a list of uint8 (H, W, 3) arrays, as the published `prepare_data.py` writes it.

    The images are stored in a single tensor, which worker processes share: forked processes inherit it, spawned processes map
    it as shared memory.

    Raises:
        FileNotFoundError: There is no such file.
        PickleRefused: The pickle needs anything but arrays of uint8.
        ImageError: The file is truncated or does not hold such a list; the message names the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        arrays = _unpickle(self.path)
        self.sizes: list[tuple[int, int]] = [array.shape[:2] for array in arrays]
        self._offsets: list[int] = []
        self._pixels = torch.empty(sum(array.size for array in arrays), dtype=torch.uint8)
        end = 0
        arrays.reverse()
        while arrays:
            array = arrays.pop()  # freed at once, because published files have gigabytes
            self._offsets.append(end)
            end += array.size
            self._pixels[self._offsets[-1] : end].numpy().reshape(array.shape)[...] = array

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` as uint8 (3, H, W), a view of the shared tensor."""
        height, width = self.sizes[index]
        start = self._offsets[index]
        return self._pixels[start : start + height * width * 3].view(height, width, 3).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class PickledImage:
    """One image of a `.pklv4` file; `str` names it in messages."""

    images: PickledImages
    index: int

    def __str__(self) -> str:
        return f"{self.images.path}[{self.index}]"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.images.sizes[self.index]

    def read(self) -> Tensor:
        """The image as uint8 (3, H, W), a view of the shared tensor."""
        return self.images[self.index]


class _Type:
    """Stand-in for `numpy.dtype`."""

    code: Any = None

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order, which single bytes do not need."""


class _Array:
    """Stand-in for `numpy.core.multiarray._reconstruct`; the array receives its pixels by `__setstate__`."""

    shape: Any = None
    kind: Any = None
    order = "C"
    data: Any = None

    def __init__(self, *_: Any) -> None:
        """Ignore type, shape and dtype of the placeholder."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.kind, column_major, self.data = state
        self.order = "F" if column_major else "C"

    def pixels(self) -> np.ndarray | None:
        """The array if it is uint8 (H, W, 3), else None."""
        code = self.kind.code if isinstance(self.kind, _Type) else None
        if code != "u1" or not isinstance(self.shape, tuple) or not isinstance(self.data, (bytes, bytearray)):
            return None
        if len(self.shape) != 3 or self.shape[2] != 3 or not all(type(side) is int and side > 0 for side in self.shape):
            return None
        if math.prod(self.shape) != len(self.data):
            return None
        return np.frombuffer(self.data, dtype=np.uint8).reshape(self.shape, order=self.order)


class _BufferArray(_Array):
    """Stand-in for `numpy.core.numeric._frombuffer`, which pickles of protocol 5 use."""

    def __init__(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        self.data, self.kind, self.shape, self.order = data, kind, shape, "F" if order == "F" else "C"


_ADMITTED = {
    ("numpy", "ndarray"): None,  # only used as an argument, which is ignored
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): _BufferArray,
    ("numpy._core.numeric", "_frombuffer"): _BufferArray,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise PickleRefused(f"it asks for {module}.{name}, which no list of images needs; nothing in it was executed")
        return _ADMITTED[module, name]


def _unpickle(path: Path) -> list[np.ndarray]:
    with open(path, "rb") as file:
        try:
            elements = _Unpickler(file).load()
        except PickleRefused as error:
            raise PickleRefused(f"{str(path)!r} is refused: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # a corrupt pickle can cause any error
            raise ImageError(f"cannot read {str(path)!r}: it is truncated or corrupt: {error}") from error
    if not isinstance(elements, list) or not elements:
        raise ImageError(f"{str(path)!r} must contain a list of images, not {_describe(elements)}")
    arrays = []
    for index, element in enumerate(elements):
        array = element.pixels() if isinstance(element, _Array) else None
        if array is None:
            raise ImageError(f"{str(path)}[{index}] must be a uint8 array of shape (H, W, 3), not {_describe(element)}")
        arrays.append(array)
    return arrays


def _describe(element: Any) -> str:
    if isinstance(element, _Array):
        return f"an array of dtype {getattr(element.kind, 'code', None)!r} and shape {element.shape}"
    return f"{'an empty' if element == [] else 'a'} {type(element).__name__}"
