"""The processes that train together, started by PyTorch's `torchrun`; without it a single process."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_TIMEOUT = timedelta(hours=1)  # processes wait for one that decodes a large data set or saves to a slow disk


class TrainingStopped(BaseException):
    """The run was stopped by SIGTERM or Ctrl-C and has saved itself; the same command resumes it.

    Like KeyboardInterrupt it is not an Exception: it is raised in whatever code runs, and code that handles, for example,
    errors of damaged files must not catch it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class OtherProcessFailed(RuntimeError):
    """The run could not start in another of its processes, which reports the reason."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among the processes that train together."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True for the process that writes files."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's share of the crops of a batch."""
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with the weights of the first process, and gradients averaged over all processes."""
        if self.world == 1:
            return module
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        if self.device.type != "cuda":
            return DistributedDataParallel(module, **options)
        # on another stream, as PyTorch's notes on CUDA graphs require if steps are captured
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            parallel = DistributedDataParallel(module, device_ids=[self.device], **options)
        current.wait_stream(stream)
        return parallel

    def mean_(self, values: Tensor) -> None:
        """Replace `values` by the mean over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values.div_(self.world))

    def largest(self, value: int) -> int:
        """The largest of the processes' values; waits for all processes, but not for a GPU."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gathered(self, value: Any) -> list[Any]:
        """The processes' values, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def together(self, call: Callable[[], T]) -> T:
        """The result of `call`, after all processes have made the call without an error.

        Raises:
            Exception: `call` raised it in this process; of processes with the same error only one raises it.
            OtherProcessFailed: `call` raised in another process.
        """
        result, error = None, None
        try:
            result = call()
        except (Exception, TrainingStopped) as caught:  # noqa: BLE001 - the others must not wait for this one
            error = caught
        messages = self.gathered(None if error is None else str(error))
        if error is not None and messages.index(str(error)) == self.rank:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise OtherProcessFailed(f"process {rank} of {self.world}: {message}")
        return result

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        self.largest(0)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, or that the caller's script has joined; `device` may be "auto".

    Raises:
        ValueError: There is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and "LOCAL_RANK" in os.environ:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda":
        if not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {str(place)!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(place)
    launched = "RANK" in os.environ and not dist.is_initialized()
    if launched:
        # gloo transports values on the host: stop signals, rows of validation
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(place, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes(place)
    finally:
        if launched:
            # DDP modules are reference cycles that hold the group, whose threads must end before Python does: a thread that
            # still frees a tensor then aborts the process
            gc.collect()
            dist.destroy_process_group()


class StopSignals:
    """A context in which SIGTERM and Ctrl-C raise TrainingStopped until `started`, as long as nothing needs to be saved.

    After `started` they are recorded in `received`; a second Ctrl-C ends the process.
    """

    def __init__(self) -> None:
        self.received = 0
        self._starting = True

    def __enter__(self) -> StopSignals:
        # only the main thread may set handlers; a run in another thread is stopped by its host program
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def started(self) -> None:
        """Record later signals; raise TrainingStopped if one was received, in case the first exception was caught."""
        self._starting = False
        if self.received:
            raise self._stopped()

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = int(number)
        if self._starting:
            raise self._stopped()

    def _stopped(self) -> TrainingStopped:
        return TrainingStopped(f"stopped by signal {self.received} before the first step; nothing was written", self.received)
