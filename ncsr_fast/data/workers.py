"""Processes that read crops, and who may stop them."""

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

    Ctrl-C and a scheduler's SIGTERM reach workers as well, but the main process needs them until it has stopped itself.
    """
    return functools.partial(_leave, _ending())


@functools.cache
def _ending() -> Any:
    """Shared with the workers: nonzero once this process ends.

    `multiprocessing` then ends its children by SIGTERM and waits for them: one that goes on ignoring it would make it wait
    forever. Exit handlers run last in, first out, so this one comes before that.
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
