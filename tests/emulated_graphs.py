"""CUDA graphs on a CPU: operators are recorded with the memory they read and wrote, and replayed on that memory.

What a replay does not see here it would not see on a GPU: Python that ran at the capture, a tensor put in another's place.
Kernels that are not PyTorch's operators are not recorded, so models run on the reference backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import no_reading
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ncsr_fast import graphs


class _Tape(TorchDispatchMode):
    """The operators called inside, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read while a graph was captured")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map(_place, (args, kwargs or {})), [_place(leaf) for leaf in tree_leaves(result)]))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for place, value in zip(results, tree_leaves(func(*args, **kwargs))):
                    if isinstance(value, Tensor) and value.data_ptr() != place.data_ptr():
                        place.copy_(value)


def _place(value: Any) -> Any:
    """A tensor's memory as it is now, whatever becomes of the tensor."""
    return value.detach() if isinstance(value, Tensor) else value


def capture(function: Callable[[], tuple[Tensor, ...]], device: torch.device, warm_up: int):
    """In place of `graphs.capture`."""
    captures.append(warm_up)
    for _ in range(warm_up):
        function()
    with _Tape() as tape:
        outputs = function()
    return tape.replay, outputs


captures: list[int] = []  # the runs before each capture of a test


@pytest.fixture
def emulated_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Has `graph=True` work on a CPU, by the reference backend. A list with an entry a capture."""
    captures.clear()
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "_check_on_gpu", lambda model: None)
    monkeypatch.setattr(sys.modules["ncsr_fast.ops.backend"], "_best", lambda kernel, kind, dtype: "reference")
    with no_reading():
        yield captures
