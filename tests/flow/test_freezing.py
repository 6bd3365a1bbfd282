"""Freezing: everything folded once on any device, the same results, and no way to change a weight that goes unnoticed."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from operator_cases import marked
from support import assert_same_weights, image, tiny_model

from ncsr_fast import NCSR, graphs
from ncsr_fast.engine.folding import fold_mixing
from ncsr_fast.engine.plan import LevelPlan
from ncsr_fast.freezing import FrozenError


@pytest.fixture(params=["cpu", "as-on-a-gpu"])
def device(request, monkeypatch):
    """Where values may be read, and where they may not."""
    if request.param != "cpu":
        monkeypatch.setattr("ncsr_fast.engine.cache.reading_is_free", lambda tensor: False)


@contextmanager
def counted():
    """The calls of what folds and inverts, and of what sums up the bits of a weight."""
    fold = mock.patch.object(LevelPlan, "_fold", autospec=True, side_effect=LevelPlan._fold)
    invert = mock.patch("ncsr_fast.engine.plan.fold_mixing", side_effect=fold_mixing)
    compare = mock.patch("ncsr_fast.engine.cache.fingerprint", side_effect=AssertionError("weights were read"))
    with fold as folded, invert as inverted, compare:
        yield lambda: (folded.call_count, inverted.call_count)


def results(model: NCSR) -> list[torch.Tensor]:
    like = model.levels[0].actnorm_bias
    lr, hr = image(1, 3, 4, 4).to(like), image(1, 3, 16, 16).to(like)
    sr = model.sample(lr, n=2, generator=torch.Generator().manual_seed(0))
    encoded = model.encode(hr, lr)
    return [sr, model.decode(encoded.latents, lr), *encoded.latents, model.nll(hr, lr)]


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_the_same_results_bit_for_bit_and_without_gradients(engine):
    model = tiny_model()
    model.engine = engine
    model.requires_grad_(False)  # torch.matmul rounds otherwise where a matrix records gradients, under no_grad too
    expected = results(model)
    assert model.freeze_for_inference() is model and model.frozen and not model.training
    found = results(model)  # gradients are enabled here
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected, strict=True))
    lr = image(1, 3, 4, 4).requires_grad_()
    assert not model.sample(lr, n=1).requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


@marked("slow", lambda device: device != "cpu")
def test_folded_at_once_and_never_again(device):
    model = tiny_model()
    with counted() as count:
        model.freeze_for_inference()
        assert count() == (3, 6)  # networks of three levels, and the maps of both directions
        results(model)
        results(model)
        graphs.Sampler(model, n=2, graph=False)(image(2, 3, 4, 4))
        assert count() == (3, 6)
        model.options = type(model.options)(backend="reference")
        results(model)
        assert count() == (3, 6)
        model.float()
        assert model.frozen
        assert count() == (6, 12)  # other weights, other constants
        model.precision = "bf16"
        model.sample(image(1, 3, 2, 2, dtype=torch.float32), n=1)
        assert count() == (9, 12)


@marked("slow", lambda device: device != "cpu")
def test_unfreezing_restores_what_was(device):
    model = tiny_model()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert not all(flags) and any(flags)
    model.freeze_for_inference().freeze_for_inference().float().unfreeze()
    assert not model.frozen and model.training and [p.requires_grad for p in model.parameters()] == flags
    assert model.unfreeze() is model
    assert model.eval().freeze_for_inference().unfreeze().training is False
    before = results(model)
    with torch.no_grad():
        model.levels[1].invconv += 0.01
        after = results(model)
    fresh = NCSR(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(after, results(fresh), strict=True))
    assert not torch.equal(before[0], after[0])


# -- what is refused before it does anything -----------------------------------------------------------------------


REFUSED = {
    "train()": lambda model: model.train(),
    "requires_grad_()": lambda model: model.requires_grad_(),
    "load_state_dict()": lambda model: model.load_state_dict(tiny_model(seed=1).state_dict()),
    "load_published()": lambda model: model.load_published(tiny_model(seed=1).published_state_dict()),
    "initialize()": lambda model: model.initialize(image(2, 3, 16, 16), image(2, 3, 4, 4)),
}


@marked("slow", lambda device: device != "cpu")
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, device):
    model = tiny_model().freeze_for_inference()
    expected = results(model)
    with pytest.raises(FrozenError) as caught:
        REFUSED[what](model)
    assert str(caught.value) == f"{what} would change the weights of a frozen model; call model.unfreeze() first"
    assert_same_weights(model, tiny_model())
    assert all(torch.equal(a, b) for a, b in zip(results(model), expected))
    REFUSED[what](model.unfreeze())


# -- what is noticed by the next pass --------------------------------------------------------------------------------


@torch.no_grad()
def in_place(model):
    model.levels[0].invconv[0, 0, 0] += 0.1
    return "levels.0.invconv"


@torch.no_grad()
def of_the_encoder(model):
    model.encoder.conv_first.weight.mul_(2)
    return "encoder.conv_first.weight"


def replaced_data(model):
    model.levels[2].actnorm_bias.data = model.levels[2].actnorm_bias.data + 0.1
    return "levels.2.actnorm_bias"


def replaced_parameter(model):
    model.levels[0].injectors.bias3 = torch.nn.Parameter(model.levels[0].injectors.bias3 + 0.1, requires_grad=False)
    return "levels.0.injectors.bias3"


def a_part_loaded(model):
    model.levels[1].load_state_dict(tiny_model(seed=1).levels[1].state_dict())
    return "levels.1.actnorm_bias"


def a_part_of_another_dtype(model):
    model.levels[1].couplings.float()
    return "levels.1.couplings.conv1"


def trainable_again(model):
    model.levels[1].invconv.requires_grad_()
    return "levels.1.invconv"


CHANGES = [
    in_place, of_the_encoder, replaced_data, replaced_parameter, a_part_loaded, a_part_of_another_dtype, trainable_again,
]  # fmt: skip
PASSES = {
    "sample": lambda model, hr, lr: model.sample(lr, n=1),
    "decode": lambda model, hr, lr: model.decode([lr.new_zeros(1, *s) for s in model.latent_shapes(2, 2)], lr),
    "encode": lambda model, hr, lr: model.encode(hr, lr),
    "nll": lambda model, hr, lr: model.nll(hr, lr),
    "Sampler": lambda model, hr, lr: graphs.Sampler(model, n=1, graph=False)(lr),
    "check_invertibility": lambda model, hr, lr: model.check_invertibility(lr),
    "to": lambda model, hr, lr: model.float(),
}


@marked("slow", lambda change: change not in (in_place, replaced_data))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_noticed(change, device):
    model = tiny_model().freeze_for_inference()
    name = change(model)
    for run in PASSES.values():
        with pytest.raises(FrozenError, match=rf"{name} was changed since .*freeze_for_inference.*model.unfreeze\(\)"):
            run(model, image(1, 3, 8, 8), image(1, 3, 2, 2))
    model.unfreeze()
    if change is a_part_of_another_dtype:
        model.double()
    again = tiny_model(seed=5)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results(model), results(again)))  # nothing stale is left
    again = results(model.freeze_for_inference())
    assert all(torch.equal(a, b) for a, b in zip(results(model.unfreeze()), again))


def test_an_optimizer_made_before_finds_nothing_to_do(device):
    """A fused one would change weights without PyTorch counting it."""
    model = tiny_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    model.nll(image(1, 3, 8, 8), image(1, 3, 2, 2)).sum().backward()
    model.freeze_for_inference()
    optimizer.step()
    assert_same_weights(model, tiny_model())
    results(model)


# -- the rest --------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_are_not_frozen():
    model = tiny_model().freeze_for_inference()
    expected = results(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copied.frozen and copied.levels[0].cache._frozen is None
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(results(copied), expected))
            copied.levels[0].invconv += 0.1
            assert not torch.equal(results(copied)[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(results(model), expected))


def test_saved_as_ever(tmp_path):
    model = tiny_model().freeze_for_inference()
    model.save_pretrained(tmp_path)
    again = NCSR.from_pretrained(tmp_path)
    assert_same_weights(again, tiny_model())
    assert not again.frozen and any(parameter.requires_grad for parameter in again.parameters())


def test_a_model_that_cannot_be_frozen_is_left_as_it_was():
    model = tiny_model()
    with torch.no_grad():
        model.levels[1].invconv[1] = 1.0
    with pytest.raises(ValueError, match="step 1.*singular"):
        model.freeze_for_inference()
    assert not model.frozen and model.training and model.levels[0].invconv.requires_grad
    with torch.inference_mode():
        model = tiny_model()
    with pytest.raises(ValueError, match=r"made under torch.inference_mode\(\)"):
        model.freeze_for_inference()


def test_frozen_inside_inference_mode_and_used_outside():
    model = tiny_model()
    with torch.inference_mode():
        model.freeze_for_inference()
        expected = results(model)
    assert all(torch.equal(a, b) for a, b in zip(results(model), expected))


def test_a_sample_that_blew_up_is_reported_where_sample_was_called():
    model = tiny_model().freeze_for_inference()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        model.sample(image(1, 3, 2, 2), n=1, temperature=1e9)
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]
