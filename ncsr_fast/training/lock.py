"""A single writer for a run's folder: a lock on RUN/lock, whose text names the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems without locks
_TEXT = b'{"pid": '  # beginning of the text of a lock
_held: set[int] = set()  # descriptors of locks


class RunInUse(OSError):
    """Another process trains in the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """A context in which this process is the only writer of `folder`, which is made if needed.

    The lock is the operating system's (`flock`). It ends with the process that holds it, however the process ends, so a lock
    file left by a killed process is no obstacle. When the context ends, the lock file is removed, and so are folders made
    here that are still empty: a start that fails leaves nothing behind.

    On NFS the lock holds between machines if the mount has locks, which is the default; with the mount options `nolock` or
    `local_lock` it holds only among processes of one machine. If there are no locks at all, a warning says so.

    Raises:
        RunInUse: Another process holds the lock; the message says which, where, and since when.
        OSError: The folder cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file, but a run needs a folder; choose another")
    path, descriptor = folder / "lock", None
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(path)
            if descriptor is not None:
                _held.add(descriptor)
        except RunInUse:
            raise
        except OSError as error:
            raise OSError(f"the run's folder {str(folder)!r} cannot be written to: {error.strerror}") from error
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)
        with contextlib.suppress(OSError):  # up to the first folder that is not empty
            for place in made:
                place.rmdir()


def is_lock(path: Path) -> bool:
    """True for a lock file, of a living process or left by a killed one."""
    if path.name != "lock" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return _TEXT.startswith(file.read(len(_TEXT)))


def _acquire(path: Path) -> int | None:
    """The descriptor of the locked file; None on a system without locks."""
    if fcntl is None:
        _warn(path, "this system has no flock")
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.read(descriptor, 4096))
            os.close(descriptor)
            raise RunInUse(
                f"{str(path.parent)!r} is in use: {holder}; wait until that process ends, stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            _warn(path, str(error))
        if _is_at(descriptor, path):
            text = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(text).encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder removed the file after it was opened here


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(text: bytes) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']} has been training in this folder since {found['since']}"
    except (ValueError, KeyError, TypeError):  # the text is being written
        return "another process has begun to train in this folder"


def _warn(path: Path, reason: str) -> None:
    warnings.warn(f"{str(path.parent)!r} cannot be locked ({reason}): make sure that no second run writes to it", stacklevel=5)


def _leave_to_parent() -> None:
    """Close the locks in a forked child, because a worker that outlives a killed run would hold the lock."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
