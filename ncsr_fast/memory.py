"""Memory: the peak of a call, errors of memory, and a limit that makes such an error come in time.

Calls are measured on the CPU, or on the "meta" device, where tensors have sizes but no memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MEMORY, _STATUS, _GROUP = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/sys/fs/cgroup")


def peak_bytes(call: Callable[[], Any]) -> int:
    """The largest number of bytes that tensors took during a call, with its results but without its arguments.

    The peak counts what operators return, also in autograd Functions, backward passes and native operators. It does not
    count memory that one operator takes and frees inside, nor that of compiled graphs. On a GPU ask the allocator:
    `torch.cuda.max_memory_allocated`.
    """
    with _Storages() as storages:
        results = call()  # referenced, so that its memory is not freed before the end
    del results
    return storages.peak


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out, on a GPU or on a CPU, where PyTorch raises a RuntimeError."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
    )


@contextlib.contextmanager
def within_free_memory() -> Iterator[None]:
    """A context in which this process cannot have more memory than is free now: asking for more raises an error.

    Without this limit, Linux promises memory that it does not have, and kills the process that uses it. On other systems
    nothing is done.
    """
    free = free_memory()
    if free is None:
        yield
        return
    import resource  # it exists wherever the free memory is known

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _kibibytes(_STATUS, "VmData") + free
    bounds = [limit for limit in (bound, before, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def free_memory() -> int | None:
    """Bytes of free memory of the machine or of this container; None if unknown."""
    try:
        free = _kibibytes(_MEMORY, "MemAvailable")
    except (OSError, KeyError):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" without a limit, and no file on other systems
        limit, used = (int((_GROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        lines = (_GROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        cached = dict(line.split() for line in lines)["inactive_file"]
        free = min(free, limit - used + int(cached))
    return max(free, 0)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors on a device can have yet; None where nothing tells. Does not wait for a GPU."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_memory() if device.type == "cpu" else None


def _kibibytes(file: Path, name: str) -> int:
    """The number of bytes in a line `name: number kB` of a file of the kernel."""
    lines = dict(line.split(":", 1) for line in file.read_text(encoding="utf-8").splitlines() if ":" in line)
    return 1024 * int(lines[name].split()[0])


class _Storages(TorchDispatchMode):
    """A context that counts the living storages made by operators inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # 0 for storages made before

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._meet((args, kwargs), made=False)
        results = operator(*args, **kwargs)
        self._meet(results, made=True)  # except views, which have the storage of an argument
        return results

    def _meet(self, values: Any, made: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes() if made else 0
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
                # called when the memory is freed: PyTorch keeps this Python object as long as the memory
                weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
