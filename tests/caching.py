"""What takes minutes to compile and changes with a few files only: made once for all processes, and for the next runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(config: pytest.Config, name: str, causes: Iterable[Path | str], make: Callable[[Path], None]) -> Path:
    """Folder in pytest's cache that `make` filled, now or in an earlier run or another process with the same causes.

    Args:
        config: Of the run; `pytest --cache-clear` makes everything anew.
        name: Of what is made. One version of it is kept.
        causes: Files, by their contents, and texts, such as versions, on which the result depends. Python's version is one.
        make: Fills the empty folder that it is given. If it raises, nothing is kept.
    """
    cache = config.cache.mkdir("made_once")
    folder = cache / f"{name}-{_digest(causes)}"
    with FileLock(cache / f"{name}.lock"):
        if not folder.exists():
            for other in cache.glob(f"{name}-*"):
                shutil.rmtree(other)
            unfinished = cache / f"unfinished-{name}-{os.getpid()}"
            unfinished.mkdir()
            try:
                make(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _digest(causes: Iterable[Path | str]) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for cause in causes:
        contents = f"{cause.name}\0".encode() + cause.read_bytes() if isinstance(cause, Path) else cause.encode()
        digest.update(f"{len(contents)}\0".encode() + contents)
    return digest.hexdigest()[:16]
