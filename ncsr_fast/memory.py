"""How much memory tensors take during a call: on the CPU, or on the "meta" device, where they have sizes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that tensors took during a call, its results included, beyond those it was given.

    Counts what operators return, in autograd Functions, backward passes and our native operators too. It does not count
    memory that the inside of one operator takes and gives back, nor that of compiled graphs. On a GPU ask the allocator:
    `torch.cuda.max_memory_allocated`.
    """
    with _Storages() as storages:
        results = call()  # kept, so that its memory is not returned before the end
    del results
    return storages.peak


class _Storages(TorchDispatchMode):
    """The storages alive that operators made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # 0 for one from before

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._meet((args, kwargs), made=False)
        results = operator(*args, **kwargs)
        self._meet(results, made=True)  # but for views: their storage is that of an argument
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
                # called when the memory goes, not when this Python object would: PyTorch keeps it as long as the memory
                weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
