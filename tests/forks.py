"""Python processes that begin with PyTorch and the package imported: forks of one that has done nothing else.

A process of its own spends seconds on these imports; a fork of one that has only imported begins at once, with no thread,
lock or random number of the tests.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# _dynamo is imported by the first optimizer
_SERVER = """
import json, os, signal, sys
import numpy, torch, torch._dynamo, torch.distributed, torch.utils.data
import ncsr_fast.cli.main, ncsr_fast.training
ncsr_fast.cli.main.build_parser()

def begin(task):
    os.chdir(task["folder"])
    os.environ.update(task["environment"])
    sys.argv = ["-c", *task["arguments"]]
    for number, name in enumerate([os.devnull, task["out"], task["errors"]]):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.alarm(300)

for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        begin(task)
        break
    print(child, flush=True)
else:
    sys.exit()
exec(compile(task["program"], "<program>", "exec"), {"__name__": "__main__"})
"""


_number = itertools.count()


class Fork:
    """A process that runs `program`, in `folder`, as `python -c program *arguments` would.

    Its standard output goes to the file `out`, if one is given. A process that does not end within five minutes is killed.
    """

    def __init__(
        self, program: str, *arguments: str, folder: Path, out: str | os.PathLike | None = None, **environment: str
    ) -> None:
        number = next(_number)
        self._said, self._complaints = (folder / f".{name}-{number}" for name in ("out", "errors"))
        task = {"program": program, "arguments": arguments, "folder": str(folder), "environment": environment}
        self.pid = _ask({**task, "out": str(out or self._said), "errors": str(self._complaints)})

    def wait(self) -> int:
        """Exit status, or minus the signal that ended it, of the process once it has ended."""
        return _ask({"wait": self.pid})

    @property
    def out(self) -> str:
        """What it has written to its standard output."""
        return self._said.read_text()

    @property
    def errors(self) -> str:
        """What it has written to its standard error."""
        return self._complaints.read_text()


def _ask(task: dict) -> int:
    server = _server()
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    """The process that forks; it ends when this one does, which closes the pipe."""
    # not in the checkout, whose folder would be imported in place of what is installed
    command = [sys.executable, "-c", _SERVER]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # nor in the group of processes that Ctrl-C interrupts: they end as their pipe does
    return subprocess.Popen(command, **streams, cwd=tempfile.gettempdir(), start_new_session=True)
