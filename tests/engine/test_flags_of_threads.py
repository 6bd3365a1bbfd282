"""Threads that compute at once: their results, and what the flags of float32, the process's own, are afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from engine.flags import LR, WORST, Watch, model_of, nll, put_back, set_flags, values

default_flags = pytest.fixture(put_back, autouse=True)


def in_threads(*functions) -> list:
    """Call them at once; returns their values, raises their errors."""
    results: list = [None] * len(functions)

    def call(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_a_pass_that_ends_leaves_the_flags_to_one_that_does_not():
    """Both are inside their first convolution; one ends, the other goes on, and then the flags are put back."""
    before = set_flags(WORST)
    both_inside, one_is_out = threading.Barrier(2, timeout=60), threading.Event()

    def run(*at_first_convolution) -> int:
        waits = list(at_first_convolution)

        def wait() -> None:
            while waits:
                waits.pop(0)()

        with Watch(wait) as watch:
            nll(model_of("fused", "native"))
        one_is_out.set()
        return watch.convolutions

    def stays() -> None:
        assert one_is_out.wait(60)

    assert in_threads(lambda: run(both_inside.wait), lambda: run(both_inside.wait, stays))[0] > 50
    assert values() == before


@pytest.mark.slow
def test_threads_share_a_model():
    """Samples and gradients of every thread are those of one alone, to the last bit, and the flags are what they were."""
    before = set_flags(WORST)
    model = model_of("fused", "native")

    def run(seed: int) -> list[torch.Tensor]:
        with torch.no_grad():
            sampled = model.sample(LR, n=2, temperature=0.5, generator=torch.Generator().manual_seed(seed))
        return [sampled, *nll(model)]

    expected = [run(seed) for seed in range(4)]
    for _ in range(3):
        for found, of in zip(in_threads(*(lambda seed=seed: run(seed) for seed in range(4))), expected):
            assert all(torch.equal(value, other) for value, other in zip(found, of, strict=True))
        assert values() == before
