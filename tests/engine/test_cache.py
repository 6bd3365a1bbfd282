"""Folded weights and inverses are kept, and never stale: every way to change a weight changes the next images."""

from __future__ import annotations

import copy
import pickle
import threading
from unittest import mock

import pytest
import torch
from operator_cases import marked
from support import image, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.engine.cache import Cache, fingerprint
from ncsr_fast.engine.folding import fold_mixing
from ncsr_fast.engine.plan import LevelPlan


def optimizer_step(model: NCSR) -> NCSR:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.nll(image(1, 3, 8, 8), image(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    return model


def fused_optimizer_step(model: NCSR) -> NCSR:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    model.nll(image(1, 3, 8, 8), image(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    return model


def load_state_dict(model: NCSR) -> NCSR:
    model.load_state_dict(tiny_model(seed=1).state_dict())
    return model


def load_published(model: NCSR) -> NCSR:
    model.load_published(tiny_model(seed=1).published_state_dict())
    return model


def in_place(model: NCSR) -> NCSR:
    with torch.no_grad():
        model.levels[0].invconv[0, 0, 0] += 0.1
    return model


def through_data(model: NCSR) -> NCSR:
    model.levels[1].couplings.conv1.data.mul_(1.1)
    return model


def permuted_through_data(model: NCSR) -> NCSR:
    weight = model.levels[1].couplings.conv3
    weight.data.copy_(weight.flip(1))  # the same memory, count of changes and sum of bits
    return model


def replaced_data(model: NCSR) -> NCSR:
    model.levels[2].actnorm_bias.data = model.levels[2].actnorm_bias.data + 0.1
    return model


def replaced_parameter(model: NCSR) -> NCSR:
    model.levels[0].injectors.bias3 = torch.nn.Parameter(model.levels[0].injectors.bias3 + 0.1)
    return model


def to_float(model: NCSR) -> NCSR:
    return model.float()


def initialized(model: NCSR) -> NCSR:
    model.initialize(image(2, 3, 16, 16), image(2, 3, 4, 4))
    return model


CHANGES = [
    optimizer_step, fused_optimizer_step, load_state_dict, load_published, in_place, through_data, permuted_through_data,
    replaced_data, replaced_parameter, to_float, initialized,
]  # fmt: skip


@torch.no_grad()
def results(model: NCSR) -> list[torch.Tensor]:
    like = model.levels[0].actnorm_bias
    lr, hr = image(1, 3, 4, 4).to(like), image(1, 3, 16, 16).to(like)
    return [model.decode(model.encode(hr, lr).latents, lr.flip(2)), model.nll(hr, lr)]


@marked("slow", lambda change: change not in (fused_optimizer_step, in_place, permuted_through_data, replaced_data))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("values_are_read", [True, False], ids=["cpu", "as-on-a-gpu"])
def test_never_stale(change, values_are_read, monkeypatch):
    if not values_are_read:
        monkeypatch.setattr("ncsr_fast.engine.cache.reading_is_free", lambda tensor: False)
    model = tiny_model()
    before = results(model)
    model = change(model)
    after = results(model)
    fresh = NCSR(model.config).to(model.levels[0].actnorm_bias.dtype)
    fresh.load_state_dict(model.state_dict())
    for was, value, expected in zip(before, after, results(fresh), strict=True):
        assert torch.equal(value, expected)
        assert was.dtype != value.dtype or not torch.equal(was, value)


def test_computed_once():
    """One folding and one inversion a level however often it is sampled; none in the next call."""
    model = tiny_model()
    lr = image(1, 3, 4, 4)
    fold = mock.patch.object(LevelPlan, "_fold", autospec=True, side_effect=LevelPlan._fold)
    invert = mock.patch("ncsr_fast.engine.plan.fold_mixing", side_effect=fold_mixing)
    with torch.no_grad(), fold as folded, invert as inverted:
        model.sample(lr, n=3)
        assert (folded.call_count, inverted.call_count) == (3, 3)
        model.sample(lr, n=2)
        assert (folded.call_count, inverted.call_count) == (3, 3)
        model.encode(image(1, 3, 16, 16), lr)
        assert (folded.call_count, inverted.call_count) == (3, 6)  # the maps of the other direction
    assert model.nll(image(1, 3, 16, 16), lr).requires_grad  # what was kept has no history, and is not used here


def test_kept_during_a_pass_alone_where_values_are_not_read(monkeypatch):
    """On a GPU a fused optimizer or the replay of a graph changes weights that PyTorch does not count as changed."""
    monkeypatch.setattr("ncsr_fast.engine.cache.reading_is_free", lambda tensor: False)
    model = tiny_model()
    invert = mock.patch("ncsr_fast.engine.plan.fold_mixing", side_effect=fold_mixing)
    with torch.no_grad(), invert as inverted:
        for passes in (1, 2):
            model.sample(image(2, 3, 4, 4), n=3)  # two images, a level decoded for one after the other
            assert inverted.call_count == 3 * passes
    assert not any(level.cache._entries for level in model.levels)


def test_copies_and_pickles_without_it():
    model = tiny_model()
    expected = results(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copied.levels[0].cache._entries
        assert all(torch.equal(a, b) for a, b in zip(results(copied), expected))
    assert set(model.state_dict()) == set(NCSR(model.config).state_dict())


def test_singular_weight_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.levels[1].invconv[1] = 1.0
        with pytest.raises(ValueError, match="step 1.*singular"):
            model.sample(image(1, 3, 2, 2), n=1)


def test_threads_hold_a_cache_each_for_itself():
    """What one relies on while it holds is compared by the others."""
    cache, weight, found = Cache(), torch.ones(2), []

    def value() -> float:
        return cache.get("value", [weight], lambda: float(weight.sum()))

    def change() -> None:
        weight.add_(1)
        found.append(value())

    thread = threading.Thread(target=change)
    with cache.held():
        assert value() == 2
        thread.start()
        thread.join()
        assert found == [4] and value() == 2
    assert value() == 4


def swapped(first: int, second: int):
    def swap(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.view(-1)[[first, second]] = x.view(-1)[[second, first]]
        return y

    return swap


def negated(first: int, second: int):
    def negate(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.view(-1)[[first, second]] *= -1
        return y

    return negate


def moved_by_opposite_bits(x: torch.Tensor) -> torch.Tensor:
    y, word = x.clone(), {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    y.view(-1).view(word)[:3] += torch.tensor([1, -2, 1], dtype=word)
    return y


IN_SILENCE = {
    "flipped": lambda x: x.flip(0),
    "transposed": lambda x: x.mT.contiguous(),
    "rolled": lambda x: x.roll(1, 1),
    "two elements swapped": swapped(0, -1),
    "elements of two blocks swapped": swapped(5, 5 + 2**17),
    "halves swapped": lambda x: x.roll(len(x) // 2, 0),
    "negated": lambda x: -x,
    "two elements negated": negated(1, -2),
    "elements of two blocks negated": negated(5, 5 + 2**17),
    "bits whose changes cancel": moved_by_opposite_bits,
}
WEIGHTS = {
    "random": lambda dtype: image(512, 512).to(dtype) - 0.5,  # two blocks of the hash, or four
    "ones and zeros": lambda dtype: (image(512, 512) < 0.5).to(dtype),  # whose bits differ in few places
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_changes_that_leave_the_sum_of_bits(dtype, weights):
    """Through `.data`, which PyTorch does not count."""
    weight = torch.nn.Parameter(WEIGHTS[weights](dtype))
    original, before = weight.detach().clone(), fingerprint([weight])
    hashes = [before[1]]
    for change in IN_SILENCE.values():
        changed = change(original)
        if not torch.equal(changed.view(torch.int16), original.view(torch.int16)):
            weight.data.copy_(changed)
            places, bits = fingerprint([weight])
            assert places == before[0]
            hashes.append(bits)
    assert len(hashes) > len(IN_SILENCE) - 3  # of ones and zeros, some are equal
    assert len(set(hashes)) == len(hashes)
    weight.data.copy_(original)
    assert fingerprint([weight]) == before


def test_a_fingerprint_is_of_all_weights():
    """Of many small ones, which share a block of the hash, in their order; and of none, and of empty ones."""
    weights = [image(3, seed=seed) for seed in range(5)]
    before = fingerprint(weights)
    assert before == fingerprint(weights) and fingerprint(weights[:4]) != before
    first, last = weights[0].clone(), weights[4].clone()
    weights[0].data.copy_(last), weights[4].data.copy_(first)
    after = fingerprint(weights)
    assert after[0] == before[0] and after[1] != before[1]
    assert fingerprint([]) == ([], 0) and fingerprint([torch.empty(0, 3), torch.ones(())])[1] != 0


def test_a_fingerprint_does_not_depend_on_threads_or_memory():
    weight = image(700, 700, dtype=torch.float32)
    shifted = torch.empty(700 * 700 + 1)[1:].view(700, 700).copy_(weight)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found += [fingerprint([tensor])[1] for tensor in (weight, shifted, weight.mT.contiguous().mT)]
        assert len(set(found)) == 1
    finally:
        torch.set_num_threads(threads)
