"""Values computed from the weights, stored while the weights stay as they are."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ncsr_fast.layout import has_memory, traced
from ncsr_fast.synchronization import reading_is_free

Built = TypeVar("Built")
_WORD = {8: torch.int32, 4: torch.int32, 2: torch.int16}  # by the size of an element
# Words hashed at once: on a CPU they and their sums stay in its caches; other devices want more.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**17, 2**20


class Cache:
    """Values by name, each with the weights it was made of.

    On a CPU a weight counts as changed when it is another tensor or memory, dtype or device, when PyTorch counted an in-place
    operation on it, or when the hash of its bits is another. The count alone would not do: fused optimizers, replays of a
    CUDA graph and edits through `.data` escape it. On a GPU, where reading the hash would make the host wait, values are
    therefore made anew by every pass, and kept during it alone (`held`). Between `freeze` and `thaw` nothing is compared
    anywhere: who freezes it sees to it that the weights stay as they are. Several threads may ask at once.
    """

    def __init__(self) -> None:
        self._entries: dict[object, tuple[object, Any]] = {}
        self._thread = threading.local()  # its `held`, in a thread that holds: the values that were made or compared since
        self._frozen: dict[object, Any] | None = None  # while frozen: what was made since

    def get(self, name: object, weights: Iterable[Tensor], build: Callable[[], Built]) -> Built:
        """The value called `name`, built when there is none or a weight changed since. Never recorded by autograd."""
        if traced():
            return build()
        frozen: dict[object, Built] | None = self._frozen
        held: dict[object, Built] | None = getattr(self._thread, "held", None)
        if frozen is not None:
            if name not in frozen:
                frozen[name] = build()
            return frozen[name]
        if held is not None and name in held:
            return held[name]
        weights = list(weights)
        if not all(map(_is_tracked, weights)):
            return build()
        value = self._compared(name, weights, build) if all(map(reading_is_free, weights)) else build()
        if held is not None:
            held[name] = value
        return value

    def _compared(self, name: object, weights: list[Tensor], build: Callable[[], Built]) -> Built:
        """The value of the weights as they are, made anew when they are not as they were."""
        state, entry = fingerprint(weights), self._entries.get(name)
        if entry is None or entry[0] != state:
            self._entries[name] = entry = state, build()
        value: Built = entry[1]
        return value

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, weights do not change: this thread makes or compares every value once."""
        self._thread.held = {}
        try:
            yield
        finally:
            self._thread.held = None

    def freeze(self) -> None:
        """From now on every value is made once, on any device, until `thaw`."""
        self._entries, self._frozen = {}, {}

    def thaw(self) -> None:
        """Forget what was made since `freeze`, and compare weights again."""
        self._frozen = None

    @property
    def frozen_values(self) -> dict[object, Any] | None:
        """The values made since `freeze`, by name; None while weights are compared."""
        return self._frozen

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()


def _is_tracked(weight: Tensor) -> bool:
    """True for a weight with memory and a count of the operations on it."""
    return has_memory(weight) and not weight.is_inference()


def place(weight: Tensor) -> tuple[Any, ...]:
    """Where and how a weight lies in memory, and the count of operations on it."""
    signs = weight.is_neg()
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, tuple(weight.shape), weight.stride(), signs


def fingerprint(weights: Iterable[Tensor]) -> tuple[list[tuple[Any, ...]], int]:
    """A fingerprint of weights on one device, equal to that of another time only if none of them changed, by whatever way.

    Besides `place`, it is a hash of their bits: exact integers, the same whatever the order of summation. A change, be it a
    permutation, flipped signs or one whose parts cancel in a sum, goes unnoticed with a probability below 2⁻²⁸. Waits for
    the device: once, for all weights.
    """
    weights = list(weights)
    return [place(weight) for weight in weights], _hash([_words(weight) for weight in weights])


def _words(weight: Tensor) -> Tensor:
    """The bits of a weight as a vector of words."""
    return weight.detach().resolve_neg().contiguous().flatten().view(_WORD[weight.element_size()])


def _hash(words: list[Tensor]) -> int:
    """Σⱼ mⱼ Σₖ nₖ bₖⱼ modulo 2⁶⁴, of words bₖⱼ at position j of block k and random 64-bit numbers mⱼ, nₖ.

    A change of words of 32 bits at one j changes the sum over k by a random multiple of some 2ᵛ, v < 32, which is 0 for one in
    2⁶⁴⁻ᵛ of all nₖ; and the sum over j by a random multiple of the largest power of two that divides all those changes. The
    sums over k cost three to four times what a plain sum of the words costs, which sees no order.
    """
    if not any(map(len, words)):
        return 0
    device, numbers = words[0].device, random.Random(0)
    size = min(sum(map(len, words)), _at_once(device))
    sums = torch.zeros(size, dtype=torch.int64, device=device)
    for block in _blocks(words, size):
        sums[: len(block)].add_(block, alpha=numbers.getrandbits(64) - 2**63)
    return int((sums * _random_words(device)[:size]).sum())


def _blocks(words: list[Tensor], size: int) -> Iterator[Tensor]:
    """All words, one after the other, in vectors of up to `size`."""
    block: list[Tensor] = []
    room = size
    for part in itertools.chain.from_iterable(vector.split(size) for vector in words):
        if len(part) > room:
            yield _joined(block)
            block, room = [], size
        block.append(part)
        room -= len(part)
    yield _joined(block)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _at_once(device: torch.device) -> int:
    return _AT_ONCE if device.type == "cpu" else _AT_ONCE_ELSEWHERE


@functools.lru_cache
def _random_words(device: torch.device) -> Tensor:
    """Random int64 numbers, as many as words are hashed at once."""
    generator, shape = torch.Generator().manual_seed(0), (_at_once(device),)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator, device="cpu", dtype=torch.int64).to(device)
