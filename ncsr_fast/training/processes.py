"""The processes that train together, started by PyTorch's `torchrun`; one alone where it was not used."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(hours=1)  # the others wait for the one that decodes a large data set or saves to a slow disk


class TrainingStopped(Exception):
    """The run was asked to stop, by SIGTERM or Ctrl-C, and has saved itself; the same command resumes it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's crops of a batch of all."""
        return slice(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with the weights of the first process, and gradients that are the mean over all of them."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def mean_(self, values: Tensor) -> None:
        """Make `values` the mean over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values.div_(self.world))

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Waits for all of them, but not for a GPU."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gathered(self, value: Any) -> list[Any]:
        """The processes' values, in their order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        self.largest(0)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started (or that the caller's own script has joined); `device` may be "auto".

    raises  ValueError for a device that is not here
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
        # gloo carries what is on the host: stop signals, validation rows
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(place, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes(place)
    finally:
        if launched:
            # DDP modules are reference cycles that hold the group, whose threads must have ended before Python does: one that
            # still frees a tensor then aborts the process
            gc.collect()
            dist.destroy_process_group()


class StopSignals:
    """Within it, SIGTERM and Ctrl-C are noted in `received` instead of ending the process; a second Ctrl-C ends it."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        # only the main thread may set handlers; a run in another one is stopped as its host program sees fit
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = int(number)
