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
from ncsr_fast.engine import conditioning, fused_level
from ncsr_fast.engine.cache import Cache


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
    optimizer_step, fused_optimizer_step, load_state_dict, load_published, in_place, through_data, replaced_data,
    replaced_parameter, to_float, initialized,
]  # fmt: skip


@torch.no_grad()
def results(model: NCSR) -> list[torch.Tensor]:
    like = model.levels[0].actnorm_bias
    lr, hr = image(1, 3, 4, 4).to(like), image(1, 3, 16, 16).to(like)
    return [model.decode(model.encode(hr, lr).latents, lr.flip(2)), model.nll(hr, lr)]


@marked("slow", lambda change: change not in (fused_optimizer_step, in_place, replaced_data))
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
        assert not torch.equal(was.to(value), value)


def test_computed_once():
    """One folding and one inversion a level however often it is sampled; none in the next call."""
    model = tiny_model()
    lr = image(1, 3, 4, 4)
    fold = mock.patch.object(fused_level, "fold_level", side_effect=conditioning.fold_level)
    invert = mock.patch.object(fused_level, "mix_level", side_effect=conditioning.mix_level)
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
    invert = mock.patch.object(fused_level, "mix_level", side_effect=conditioning.mix_level)
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
