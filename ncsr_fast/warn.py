"""Warnings of the package, reported at the line of the program that called it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
_SUBJECT: ContextVar[str] = ContextVar("subject", default="")


def warn_caller(message: str) -> None:
    """Give a RuntimeWarning, reported at the line that called the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(_SUBJECT.get() + message, RuntimeWarning, stacklevel=level)


@contextmanager
def warnings_about(file: object) -> Iterator[None]:
    """A context in which warnings name the file that is computed: those of two files are not the same one, given once."""
    token = _SUBJECT.set(f"{str(file)!r}: ")
    try:
        yield
    finally:
        _SUBJECT.reset(token)
