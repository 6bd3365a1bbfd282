"""Decoded images, kept on disk for every process that reads them.

Four files in one folder:

pixels   uint8 (H, W, 3) of one image after the other, at places known in advance from the images' headers; sparse
flags    a byte an image, set once its pixels are complete
index    what the others were made for, as JSON; written last
lock     held shared by each process that uses them, alone by the one that makes them

An image is written by whichever process decodes it first. Two that do so at once write the same bytes, and one that
is killed half-way leaves the flag unset. What the kernel holds in memory of the files every process shares; it may
be lost when the machine goes down, a flag without its pixels among it, so a cache is not used after that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import read_image
from ncsr_fast.files import atomic_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ATTEMPTS, _PAUSE = 20, 0.05  # s between them: how long another process may be in the way
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ImageCache:
    """The pixels of image files, decoded once.

    A cache of the same files, sizes and limit that is there already is used, any other replaced. Where none can be
    kept (a folder that cannot be written to or locked, or that a running process uses for other images, or a disk
    that is full) a warning says so, and images are decoded every time.

    Args:
        folder: Of the cache, made if there is none. Of several machines that share a disk each needs one of its own.
        limit: Bytes of pixels on disk at most, and never more than half of what is free there. Images that do not fit, in
            the order of `sizes`, are decoded every time.
        sizes: (height, width) of each file, as its header tells.
    """

    def __init__(self, folder: str | os.PathLike, limit: int, sizes: Mapping[Path, tuple[int, int]]) -> None:
        self.folder = Path(folder)
        self._paths = list(sizes)
        self._key = {"limit": limit, "boot": _boot_id(), "files": [_stamp(path, size) for path, size in sizes.items()]}
        self._open()

    def read(self, path: Path) -> Tensor:
        """An image as uint8 (3, H, W), to be read only: it may be a view of the file. Raises what `read_image` does."""
        place = self._places.get(path)
        if place is None:
            return read_image(path)
        number, start, (height, width) = place
        if self._flags[number]:
            return self._pixels[start : start + height * width * 3].view(height, width, 3).permute(2, 0, 1)
        image = read_image(path)
        if image.shape == (3, height, width):  # the header told otherwise, or the file is another by now
            self._write(number, start, image)
        return image

    def remove(self) -> None:
        """Delete the files, and the folder if nothing else is in it. Processes that use them can go on doing so."""
        _remove(self.folder)

    def _open(self) -> None:
        self._places: dict[Path, tuple[int, int, tuple[int, int]]] = {}
        self._files: list[Any] = []
        try:
            starts, total = self._lock()
            self._files += [open(self.folder / name, "rb+", buffering=0) for name in ("pixels", "flags")]
            # memory maps that fork inherits
            self._pixels = torch.from_file(str(self.folder / "pixels"), shared=True, size=total, dtype=torch.uint8)
            self._flags = torch.from_file(str(self.folder / "flags"), shared=True, size=len(starts), dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            self._warn(error)
            return
        sizes = (file["size"] for file in self._key["files"])
        for number, (path, start, size) in enumerate(zip(self._paths, starts, sizes)):
            if start is not None:
                self._places[path] = (number, start, tuple(size))

    def _lock(self) -> tuple[list[int | None], int]:
        """Share the lock with those who use the same cache, made first if need be; where its images start, and its end."""
        if fcntl is None:
            raise OSError("files cannot be locked on this system")
        for _ in range(_ATTEMPTS):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "ab")
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # nobody else uses it; without a boot id, what a process wrote that is gone may have been lost
                    if self._key["boot"] is None or self._index() is None:
                        self._make()
                except BlockingIOError:
                    pass
                fcntl.flock(lock, fcntl.LOCK_SH)  # waits for one who is making it
                index = self._index()
                if index is not None and _same_file(lock.fileno(), self.folder / "lock"):
                    self._files.append(lock)
                    return index["starts"], index["total"]
            finally:
                if lock not in self._files:
                    lock.close()
            time.sleep(_PAUSE)
        raise OSError("a running process uses it for other images")

    def _index(self) -> dict[str, Any] | None:
        try:
            index = json.loads((self.folder / "index").read_text(encoding="utf-8"))
            return index if index["key"] == self._key else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _make(self) -> None:
        """New files: those of before are unlinked, not overwritten, and stay what they were for whoever has them open."""
        for name in ("index", "flags", "pixels"):
            (self.folder / name).unlink(missing_ok=True)
        room, total = min(self._key["limit"], shutil.disk_usage(self.folder).free // 2), 0
        starts: list[int | None] = []
        for file in self._key["files"]:
            size = file["size"][0] * file["size"][1] * 3
            fits = total + size <= room
            starts.append(total if fits else None)
            total += size if fits else 0
        for name, size in (("pixels", total), ("flags", len(starts))):
            with open(self.folder / name, "wb") as file:
                file.truncate(size)
        with atomic_write(self.folder / "index") as temporary:
            temporary.write_text(json.dumps({"key": self._key, "starts": starts, "total": total}), encoding="utf-8")

    def _write(self, number: int, start: int, image: Tensor) -> None:
        _, pixels, flags = self._files
        try:
            # not through the map, where a full disk is a fatal signal, nor with seek: forked processes share the position
            rest = memoryview(image.permute(1, 2, 0).contiguous().numpy()).cast("B")
            while rest:
                written = os.pwrite(pixels.fileno(), rest, start)
                start, rest = start + written, rest[written:]
            os.pwrite(flags.fileno(), b"\1", number)
        except OSError as error:
            self._warn(error)
            self._places = {}  # what is there already is on a disk in trouble too

    def _warn(self, error: Exception) -> None:
        warnings.warn(f"no decoded images are kept in {str(self.folder)!r}, they are decoded every time: {error}", stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "_paths", "_key")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a spawned process: the files are opened anew."""
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()


def remove_caches(folder: Path) -> None:
    """Delete the caches in the folders in `folder`, and what of these is empty then; anything else in them stays."""
    for cache in filter(Path.is_dir, folder.glob("*")):
        if (cache / "lock").exists():
            _remove(cache)
    with contextlib.suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


def _remove(cache: Path) -> None:
    """Delete a cache's files, halves of an index among them, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for path in (*(cache / name for name in ("index", "flags", "pixels", "lock")), *cache.glob(".index.*")):
            path.unlink(missing_ok=True)
        cache.rmdir()


def _stamp(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """What tells an image file from an older one of its name, JSON-ready."""
    status = os.stat(path)
    return {"path": str(path.absolute()), "bytes": status.st_size, "modified": status.st_mtime_ns, "size": list(size)}


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`: it may have been removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
