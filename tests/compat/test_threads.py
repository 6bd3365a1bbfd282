"""An accelerated network called by several threads at once computes for each of them what it computes for one alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from compat.networks import SMALL, accelerated_twins, gradients
from compat.test_network import replicate
from operator_cases import marked
from support import image, relative_error

from ncsr_fast import NCSR
from ncsr_fast.compat import engine

Z = image(2, 96, 4, 5, seed=9)
IMAGES = [SMALL.images(seed=seed) for seed in (1, 11, 21)]


@pytest.fixture
def pair():
    net, untouched, report = accelerated_twins(SMALL)
    yield net, untouched
    assert not report.handed_over


def likelihood(net, images) -> torch.Tensor:
    """With its gradients recorded."""
    return net(**images)[1]


def trained(net, images) -> torch.Tensor:
    """The gradient of an encoder weight."""
    return torch.autograd.grad(net(**images)[1].mean(), net.RRDB.conv_first.weight)[0]


@torch.no_grad()
def scored(net, images) -> torch.Tensor:
    return net(**images)[1]


@torch.no_grad()
def sampled(net, images) -> torch.Tensor:
    return net(lr=images["lr"], z=Z, eps_std=0.0, reverse=True, **SMALL.condition())[0]


@torch.no_grad()
def sampled_under_noise(net, images) -> torch.Tensor:
    return net(lr=images["lr"], z=Z, eps_std=0.0, reverse=True, std=images["std"])[0]


CALLS = [likelihood, trained, scored, sampled, sampled_under_noise]


def in_thread(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Start a call in another thread; the function returned waits for its value, or raises its error."""
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> torch.Tensor:
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    return wait


def assert_right(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(found.detach(), expected.detach()) <= 1e-6


@marked("slow", lambda call: call not in (trained, sampled))
@pytest.mark.parametrize("meanwhile", CALLS, ids=lambda call: call.__name__)
@marked("slow", lambda call: call not in (likelihood, sampled))
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.slow
def test_a_call_during_another(pair, call, meanwhile):
    """The other begins and ends while the first is about to run its encoder, and again after it has run it."""
    net, untouched = pair
    trained(net, IMAGES[2])
    sampled(net, IMAGES[2])  # something is kept, of another image
    inside, found = threading.get_ident(), []
    encode = NCSR.features

    def other() -> None:
        if threading.get_ident() == inside:
            found.append(in_thread(lambda: meanwhile(net, IMAGES[1]))())

    def features(*arguments, **options):
        other()
        value = encode(*arguments, **options)
        other()
        return value

    with mock.patch.object(NCSR, "features", features):
        own = call(net, IMAGES[0])
    assert len(found) == 2
    assert_right(own, call(untouched, IMAGES[0]))
    for value in found:
        assert_right(value, meanwhile(untouched, IMAGES[1]))


def test_another_image_takes_the_place_of_the_one_kept(pair):
    """After the first call found its image to be the one that is kept."""
    net, untouched = pair
    sampled(net, IMAGES[0])
    inside, found, same = threading.get_ident(), [], engine._same

    def then_another(*arguments):
        value = same(*arguments)
        if threading.get_ident() == inside:
            found.append(in_thread(lambda: sampled(net, IMAGES[1]))())
        return value

    with mock.patch.object(engine, "_same", then_another):
        own = sampled(net, IMAGES[0])
    assert len(found) == 1
    assert_right(own, sampled(untouched, IMAGES[0]))
    assert_right(found[0], sampled(untouched, IMAGES[1]))


def test_backward_in_another_thread(pair):
    """While the network is called again, with and without gradients."""
    net, untouched = pair
    values = [likelihood(net, images) for images in IMAGES[:2]]
    weights = list(net.parameters())

    def backward(value: torch.Tensor) -> list[torch.Tensor | None]:
        return torch.autograd.grad(value.mean(), weights, allow_unused=True)

    waiting = [in_thread(lambda value=value: backward(value)) for value in values]
    again, sample = likelihood(net, IMAGES[2]), sampled(net, IMAGES[2])
    assert_right(again, likelihood(untouched, IMAGES[2]))
    assert_right(sample, sampled(untouched, IMAGES[2]))
    for wait, images in zip(waiting, IMAGES):
        for found, expected in zip(wait(), gradients(untouched, **images).values()):
            assert (found is None) == (expected is None)
            if expected is not None:
                assert_right(found, expected)


@pytest.mark.slow
def test_many_threads(pair):
    net, untouched = pair
    jobs = [(call, images) for call in CALLS for images in IMAGES]
    expected = [call(untouched, images).detach() for call, images in jobs]

    def run(first: int) -> None:
        for index in range(first, first + len(jobs)):
            call, images = jobs[index % len(jobs)]
            assert_right(call(net, images), expected[index % len(jobs)])

    for wait in [in_thread(lambda first=first: run(first)) for first in (0, 4, 7, 11)]:
        wait()


def test_replicas_in_threads(pair):
    """What DataParallel does with devices: every replica has a thread, all count together."""
    net, untouched = pair
    report = net.__dict__["forward"].__self__.handed_over
    replicas = [replicate(net) for _ in IMAGES]
    waiting = [in_thread(lambda net=net, own=own: likelihood(net, own)) for net, own in zip(replicas, IMAGES)]
    for wait, images in zip(waiting, IMAGES):
        assert_right(wait(), likelihood(untouched, images))
    assert net.calls == 0 and all(replica.__dict__["forward"].__self__.handed_over is report for replica in replicas)
