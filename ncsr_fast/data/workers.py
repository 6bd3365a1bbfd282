"""Worker processes that read crops, and how they end."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


def leave_signals() -> Callable[[int], None]:
    """A `worker_init_fn` that leaves SIGINT and SIGTERM to the main process.

    Ctrl-C and a scheduler's SIGTERM also reach workers, but the main process needs the workers until it has stopped itself.
    """
    return functools.partial(_leave, _ending())


@functools.cache
def _ending() -> Any:
    """A value shared with the workers, nonzero once this process ends.

    At its exit `multiprocessing` ends its children by SIGTERM and waits for them; a child that still ignores SIGTERM would
    make it wait forever. Exit handlers run last in, first out, so this handler runs before that of `multiprocessing`.
    """
    ending = multiprocessing.RawValue("b", 0)
    atexit.register(setattr, ending, "value", 1)
    return ending


def _leave(ending: Any, worker: int) -> None:
    def terminate(number: int, frame: FrameType | None) -> None:
        if ending.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
