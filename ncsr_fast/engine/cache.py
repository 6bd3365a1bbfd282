"""Values computed from the weights, cached until a weight changes."""

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
# Words hashed at once: on a CPU they fit its caches with their sums; other devices need more.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**17, 2**20


class Cache:
    """Values by name, each with the weights it was computed from.

    On a CPU a weight counts as changed if it is another tensor, has other memory, dtype or device, if PyTorch counted an
    in-place operation on it, or if the hash of its bits differs. The count is not enough, because fused optimizers, replays of
    a CUDA graph and edits of `.data` bypass it. On a GPU, reading the hash would make the host wait, so values are computed
    again in every pass and cached only during the pass (`held`). Between `freeze` and `thaw` nothing is compared on any
    device; the caller of `freeze` must not change the weights. Several threads may use a cache at once.
    """

    def __init__(self) -> None:
        self._entries: dict[object, tuple[object, Any]] = {}
        self._thread = threading.local()  # attribute `held`: inside `held`, the values made or compared since
        self._frozen: dict[object, Any] | None = None  # while frozen: the values made since

    def get(self, name: object, weights: Iterable[Tensor], build: Callable[[], Built]) -> Built:
        """The value called `name`, built if there is none or a weight changed since; never recorded by autograd."""
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
        """The value for the present weights, built again if they changed."""
        state, entry = fingerprint(weights), self._entries.get(name)
        if entry is None or entry[0] != state:
            self._entries[name] = entry = state, build()
        value: Built = entry[1]
        return value

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which weights do not change: this thread makes or compares every value only once."""
        self._thread.held = {}
        try:
            yield
        finally:
            self._thread.held = None

    def freeze(self) -> None:
        """Make every value only once, on any device, until `thaw`."""
        self._entries, self._frozen = {}, {}

    def thaw(self) -> None:
        """Forget the values made since `freeze`, and compare weights again."""
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
    """True for a weight with memory and a count of in-place operations."""
    return has_memory(weight) and not weight.is_inference()


def place(weight: Tensor) -> tuple[Any, ...]:
    """Address, layout, dtype and device of a weight, and its count of in-place operations."""
    signs = weight.is_neg()
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, tuple(weight.shape), weight.stride(), signs


def fingerprint(weights: Iterable[Tensor]) -> tuple[list[tuple[Any, ...]], int]:
    """A fingerprint of weights on one device: two fingerprints are equal only if no weight changed in between.

    It contains `place` and a hash of the bits, in exact integers that do not depend on the order of summation. Any change,
    also a permutation, flipped signs or changes that cancel in a sum, goes unnoticed with a probability below 2⁻²⁸. The
    function waits for the device once, for all weights.
    """
    weights = list(weights)
    return [place(weight) for weight in weights], _hash([_words(weight) for weight in weights])


def _words(weight: Tensor) -> Tensor:
    """The bits of a weight as a vector of words."""
    return weight.detach().resolve_neg().contiguous().flatten().view(_WORD[weight.element_size()])


def _hash(words: list[Tensor]) -> int:
    """Hash Σⱼ mⱼ Σₖ nₖ bₖⱼ modulo 2⁶⁴ of words bₖⱼ at position j of block k, with random 64-bit numbers mⱼ, nₖ.

    A change of 32-bit words at one j changes the sum over k by a random multiple of some 2ᵛ, v < 32, which is 0 for one in
    2⁶⁴⁻ᵛ of all nₖ; and the sum over j by a random multiple of the largest power of two that divides all those changes. The
    sums over k cost three to four times as much as a sum of the words, which does not notice permutations.
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
    """All words in order, in vectors of up to `size` words."""
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
