"""Decoded images, cached on disk for every process that reads them.

A cache is a folder with four files:

pixels   uint8 (H, W, 3) of all images, one after the other, at places known in advance from the images' headers; sparse
flags    one byte per image, set once its pixels are complete
index    the files that the cache was made for, as JSON; written last
lock     held shared by each process that uses the cache, exclusively by the process that makes it

An image is written by whichever process decodes it first. Two processes that write an image at once write the same bytes, and a
process that is killed half-way leaves the flag unset. All processes share the pages of the files that the kernel holds in
memory. Such pages may be lost when the machine goes down, and a flag may survive without its pixels, so a cache is not used
after a reboot.
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

_ATTEMPTS, _PAUSE = 20, 0.05  # attempts, and seconds between them, while another process holds the lock
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ImageCache:
    """The pixels of image files, decoded once.

    An existing cache of the same files, sizes and limit is used; any other cache is replaced. If no cache is possible (the
    folder cannot be written to or locked, a running process uses it for other images, or the disk is full), a warning says
    so, and images are decoded every time.

    Args:
        folder: The folder of the cache, made if it does not exist. Machines that share a disk need a folder each.
        limit: Largest number of bytes of pixels on disk; at most half of the free space is used. Images that do not fit, in
            the order of `sizes`, are decoded every time.
        sizes: (height, width) of each file, as its header tells.
    """

    def __init__(self, folder: str | os.PathLike, limit: int, sizes: Mapping[Path, tuple[int, int]]) -> None:
        self.folder = Path(folder)
        self._paths = list(sizes)
        self._key = {"limit": limit, "boot": _boot_id(), "files": [_stamp(path, size) for path, size in sizes.items()]}
        self._open()

    def read(self, path: Path) -> Tensor:
        """An image as uint8 (3, H, W), not to be written to: it may be a view of the file. Raises as `read_image` does."""
        place = self._places.get(path)
        if place is None:
            return read_image(path)
        number, start, (height, width) = place
        if self._flags[number]:
            return self._pixels[start : start + height * width * 3].view(height, width, 3).permute(2, 0, 1)
        image = read_image(path)
        if image.shape == (3, height, width):  # else the header was wrong, or the file was replaced
            self._write(number, start, image)
        return image

    def remove(self) -> None:
        """Delete the files, and the folder if it is then empty. Processes that use the files can continue to do so."""
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
        """Acquire the shared lock, making the cache if needed; return the position of each image and the end."""
        if fcntl is None:
            raise OSError("files cannot be locked on this system")
        for _ in range(_ATTEMPTS):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "ab")
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # no other process uses the cache; without a boot id, bytes written by an ended process may have been lost
                    if self._key["boot"] is None or self._index() is None:
                        self._make()
                except BlockingIOError:
                    pass
                fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a process that makes the cache
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
        """Make new files; old files are unlinked, not overwritten, so that processes can still read them."""
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
            self._places = {}  # the disk may be at fault, so existing pixels are not used either

    def _warn(self, error: Exception) -> None:
        warnings.warn(f"decoded images are not cached in {str(self.folder)!r}, but decoded every time: {error}", stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("folder", "_paths", "_key")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the files again in a spawned process."""
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()


def remove_caches(folder: Path) -> None:
    """Delete the caches in subfolders of `folder`, and the subfolders that are then empty; other files stay."""
    for cache in filter(Path.is_dir, folder.glob("*")):
        if (cache / "lock").exists():
            _remove(cache)
    with contextlib.suppress(OSError):  # it is not empty, or not there
        folder.rmdir()


def _remove(cache: Path) -> None:
    """Delete a cache's files, also a half-written index, and the folder if it is then empty."""
    with contextlib.suppress(OSError):
        for path in (*(cache / name for name in ("index", "flags", "pixels", "lock")), *cache.glob(".index.*")):
            path.unlink(missing_ok=True)
        cache.rmdir()


def _stamp(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Values that differ between an image file and an older file of the same name, JSON-ready."""
    status = os.stat(path)
    return {"path": str(path.absolute()), "bytes": status.st_size, "modified": status.st_mtime_ns, "size": list(size)}


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _same_file(descriptor: int, path: Path) -> bool:
    """True if an open file is still the file at `path`, and was not removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
