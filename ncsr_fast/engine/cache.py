"""What is computed from the weights, kept while they stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ncsr_fast.layout import has_memory, traced
from ncsr_fast.synchronization import reading_is_free

Built = TypeVar("Built")
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by the size of an element; they wrap around when summed


class Cache:
    """Values by name, each with the weights it was made of.

    On a CPU a weight counts as changed when it is another tensor or memory, dtype or device, when PyTorch counted an in-place
    operation on it, or when its bits sum up to something else. The count alone would not do: fused optimizers, replays of a
    CUDA graph and edits through `.data` escape it. On a GPU, where reading the sum would make the host wait, values are
    therefore made anew by every pass, and kept during it alone (`held`). Between `freeze` and `thaw` nothing is compared
    anywhere: who freezes it sees to it that the weights stay as they are.
    """

    def __init__(self) -> None:
        self._entries: dict[object, tuple[tuple | None, object]] = {}
        self._sound: set[object] | None = None  # while held: what was made or compared since
        self._frozen: dict[object, object] | None = None  # while frozen: what was made since

    def get(self, name: object, weights: Iterable[Tensor], build: Callable[[], Built]) -> Built:
        """The value called `name`, built when there is none or a weight changed since. Never recorded by autograd."""
        if self._frozen is not None and not traced():
            if name not in self._frozen:
                self._frozen[name] = build()
            return self._frozen[name]
        if self._sound is not None and name in self._sound:
            return self._entries[name][1]
        weights = list(weights)
        if traced() or not all(map(_is_tracked, weights)):
            return build()
        state = tuple(map(_state, weights)) if all(map(reading_is_free, weights)) else None
        entry = self._entries.get(name)
        if entry is None or state is None or entry[0] != state:
            entry = state, build()
        if state is not None or self._sound is not None:
            self._entries[name] = entry
        if self._sound is not None:
            self._sound.add(name)
        return entry[1]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, weights do not change: every value is made or compared once."""
        self._sound = set()
        try:
            yield
        finally:
            self._sound = None
            self._entries = {name: entry for name, entry in self._entries.items() if entry[0] is not None}

    def freeze(self) -> None:
        """From now on every value is made once, on any device, until `thaw`."""
        self._entries, self._frozen = {}, {}

    def thaw(self) -> None:
        """Forget what was made since `freeze`, and compare weights again."""
        self._frozen = None

    def __deepcopy__(self, memo: dict) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple:
        return Cache, ()


def _is_tracked(weight: Tensor) -> bool:
    """Whether it has memory, and a count of the operations on it."""
    return has_memory(weight) and not weight.is_inference()


def _state(weight: Tensor) -> tuple:
    return *place(weight), int(_bits(weight))


def place(weight: Tensor) -> tuple:
    """Where and how a weight lies in memory, and the count of operations on it."""
    signs = weight.is_neg()
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, tuple(weight.shape), weight.stride(), signs


def _bits(weight: Tensor) -> Tensor:
    """Their sum."""
    integers = weight.detach().resolve_neg().contiguous().view(_BITS[weight.element_size()])
    return integers.sum(dtype=integers.dtype)  # 40 times faster than widened to int64: 1 ms for 41 M weights


def fingerprint(weights: list[Tensor]) -> tuple:
    """What equals that of another time only when no weight, all of one dtype, changed between, by whatever way. Waits for the
    device: once, for all of them.
    """
    return [place(weight) for weight in weights], torch.stack([_bits(weight) for weight in weights]).tolist()
