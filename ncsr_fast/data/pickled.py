"""Published `.pklv4` files, pickled lists of images, read without letting the file call anything.

Unpickling calls whatever a file names. Here the few names a pickled array needs stand for classes of this module
that only take notes, and every other name is refused; not even numpy is handed arguments of the file's choosing.
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
    """A pickle that asks for something no list of images needs; the message names both."""


class PickledImages:
    """The images of a `.pklv4` file: a list of uint8 (H, W, 3) arrays, as the published `prepare_data.py` writes it.

    They are kept one after the other in a single tensor, which worker processes share: forked ones by inheritance,
    spawned ones through shared memory.

    Raises:
        FileNotFoundError: There is no such file.
        PickleRefused: The pickle asks for anything but arrays of uint8.
        ImageError: The file is truncated or holds anything but such a list; the message names the file.
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
            array = arrays.pop()  # let go of at once: published files have gigabytes
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
        """Height and width."""
        return self.images.sizes[self.index]

    def read(self) -> Tensor:
        """uint8 (3, H, W), a view of the shared tensor."""
        return self.images[self.index]


class _Type:
    """Stands for `numpy.dtype`."""

    code: Any = None

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """The byte order, of no account for single bytes."""


class _Array:
    """Stands for `numpy.core.multiarray._reconstruct`, whose array gets its pixels by `__setstate__`."""

    shape: Any = None
    kind: Any = None
    order = "C"
    data: Any = None

    def __init__(self, *_: Any) -> None:
        """The placeholder's type, shape and dtype."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.kind, column_major, self.data = state
        self.order = "F" if column_major else "C"

    def pixels(self) -> np.ndarray | None:
        """The array if it is a uint8 (H, W, 3) one, else None."""
        code = self.kind.code if isinstance(self.kind, _Type) else None
        if code != "u1" or not isinstance(self.shape, tuple) or not isinstance(self.data, (bytes, bytearray)):
            return None
        if len(self.shape) != 3 or self.shape[2] != 3 or not all(type(side) is int and side > 0 for side in self.shape):
            return None
        if math.prod(self.shape) != len(self.data):
            return None
        return np.frombuffer(self.data, dtype=np.uint8).reshape(self.shape, order=self.order)


class _BufferArray(_Array):
    """Stands for `numpy.core.numeric._frombuffer`, protocol 5's way."""

    def __init__(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        self.data, self.kind, self.shape, self.order = data, kind, shape, "F" if order == "F" else "C"


_ADMITTED = {
    ("numpy", "ndarray"): None,  # only ever an argument, which is not looked at
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): _BufferArray,
    ("numpy._core.numeric", "_frombuffer"): _BufferArray,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise PickleRefused(f"it asks for {module}.{name}, which no list of images needs; nothing of it was run")
        return _ADMITTED[module, name]


def _unpickle(path: Path) -> list[np.ndarray]:
    with open(path, "rb") as file:
        try:
            elements = _Unpickler(file).load()
        except PickleRefused as error:
            raise PickleRefused(f"{str(path)!r} is refused: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # a corrupt pickle can ask for any operation on anything
            raise ImageError(f"cannot read {str(path)!r}, it is truncated or corrupt: {error}") from error
    if not isinstance(elements, list) or not elements:
        raise ImageError(f"{str(path)!r} must hold a list of images, not {_describe(elements)}")
    arrays = []
    for index, element in enumerate(elements):
        array = element.pixels() if isinstance(element, _Array) else None
        if array is None:
            raise ImageError(f"{str(path)}[{index}] must be a uint8 array of shape (H, W, 3), not {_describe(element)}")
        arrays.append(array)
    return arrays


def _describe(element: Any) -> str:
    if isinstance(element, _Array):
        return f"one of dtype {getattr(element.kind, 'code', None)!r} and shape {element.shape}"
    return f"{'an empty' if element == [] else 'a'} {type(element).__name__}"
