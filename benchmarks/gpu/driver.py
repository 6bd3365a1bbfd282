"""Items one after the other, each in a forked process with a deadline; a line of JSON for each thing that was found out.

A fork costs milliseconds, where a Python of its own would import PyTorch for seconds. It has a CUDA context of its own, and
that is what an error of a kernel breaks. A process that has asked for a GPU leaves its forks without one, so nothing here asks,
computes or starts a thread.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .session import RESULTS, Session, Setup, some_of

LOG = "log.txt"
_SUMMARY_SECONDS = 5.0  # of the whole time, left for the end
_KILLED_SECONDS = 10.0  # a process with a kernel that does not end may take as long to go
_TRACEBACK_SECONDS = 2.0  # so long before the deadline, the log gets to know where an item is
_POLL_SECONDS = 0.02
# what profilers, optimizers and operators import at their first use; no fork needs to do it again
_PRELOADED = ("torch._dynamo", "torch.utils.data", "ncsr_fast.kernels")
_LAST_LINES = 12  # of a traceback, or of what was printed


@dataclass(frozen=True)
class Item:
    """One thing to find out.

    Attributes:
        name: In the results and on the command line.
        run: Called in a process of its own.
        seconds: What it is expected to take. It is skipped where less is left, and killed after twice as long.
    """

    name: str
    run: Callable[[Session], None]
    seconds: float


def run_items(items: Sequence[Item], setup: Setup, minutes: float) -> list[dict[str, Any]]:
    """The rows of all items, which `setup.out / RESULTS` has too, each from the moment it was known.

    A row has `item`; `part`, or None for the row that closes an item; `ok`, None where it was skipped; `seconds`; `error`, also
    the reason of a skip; `figures`; `dry`.
    """
    setup.out.mkdir(parents=True, exist_ok=True)
    results = setup.out / RESULTS
    results.write_text("", encoding="utf-8")
    (setup.out / LOG).write_text("", encoding="utf-8")
    end = time.monotonic() + 60 * minutes - _SUMMARY_SECONDS
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):  # where there is no Triton, those items say so that need it
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        setup = replace(setup, scratch=Path(folder))
        for item in items:
            left = end - time.monotonic()
            if left < item.seconds:
                reason = f"it takes {item.seconds:.0f} s, and {max(0.0, left):.0f} s of {minutes:g} minutes are left"
                setup.record(item.name, None, None, 0.0, reason)
            else:
                _run_item(item, setup, min(2 * item.seconds, left))
            print(progress(read_rows(results)[-1]), flush=True)
    return read_rows(results)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. Raises ValueError for a file of anything else."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows or not all({"item", "part", "ok", "seconds", "error", "figures", "dry"} <= row.keys() for row in rows):
            raise ValueError("its lines are not results")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no file of results of `python -m ncsr_fast.benchmarks.gpu`: {error}") from error
    return rows


def progress(row: dict[str, Any]) -> str:
    """A closing row in a line."""
    said = {True: "ok", False: "FAILED", None: "skipped"}[row["ok"]]
    reason = f": {row['error'].strip().splitlines()[-1]}" if row["error"] else ""
    return f"{row['item']:24} {said:8}{row['seconds']:6.1f} s{reason}"


def _run_item(item: Item, setup: Setup, seconds: float) -> None:
    """Run an item in a process; the row that closes it is written there, or here where the process was killed."""
    written = len((setup.out / LOG).read_bytes())
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_the_child(item, setup, started, seconds)
    try:
        status = _wait(child, started + seconds)
    finally:
        _kill_group(child)  # and what it started and has not ended
    killed = status is None
    if killed:
        status = _wait(child, time.monotonic() + _KILLED_SECONDS)
    rows = (setup.out / RESULTS).read_text(encoding="utf-8").splitlines()
    if not rows or not _closes(json.loads(rows[-1]), item):
        why = f"killed after {seconds:.0f} s" if killed else f"its process ended with status {status}"
        if killed and status is None:
            why += f", and still there {_KILLED_SECONDS:.0f} s later"
        last = (setup.out / LOG).read_bytes()[written:].decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        setup.record(item.name, None, False, time.monotonic() - started, "\n".join([*last, why]))


def _closes(row: dict[str, Any], item: Item) -> bool:
    return (row["item"], row["part"]) == (item.name, None)


def _be_the_child(item: Item, setup: Setup, started: float, seconds: float) -> None:
    """Run an item and leave: with status 0, or 1 where something failed."""
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(setup.out / LOG, os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        print(f"== {item.name}", flush=True)
        faulthandler.enable()
        faulthandler.dump_traceback_later(seconds - min(_TRACEBACK_SECONDS, 0.5 * seconds))
        session = Session(setup, item.name, started + seconds)
        error = None
        try:
            item.run(session)
        except BaseException:
            traceback.print_exc()
            error = "\n".join(traceback.format_exc().strip().splitlines()[-_LAST_LINES:])
        failed = session.failed
        if error is None and failed:
            error = f"{len(failed)} of its parts failed: {some_of(failed)}"
        setup.record(item.name, None, error is None, time.monotonic() - started, error)
        status = 0 if error is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # past all that might wait for a device or a thread


def _wait(child: int, until: float) -> int | None:
    """Exit status of a process, or minus the signal that ended it; None if it is still there."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(_POLL_SECONDS)


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
