"""What is kept between two samples of an accelerated network is never stale, and is kept where nothing changed."""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
import torch
from compat.networks import SMALL, accelerated_twins, twins
from operator_cases import marked
from support import image, relative_error

import ncsr_fast
from ncsr_fast import NCSR

Z = image(2, 96, 4, 5, seed=9)
LAYER = 3  # a conditional step


def decode(net, lr, **condition):
    return net(lr=lr, z=Z.to(lr), eps_std=0.0, reverse=True, **(condition or SMALL.condition(lr.dtype)))[0]


@pytest.fixture
def pair():
    net, untouched, _ = accelerated_twins(SMALL)
    decode(net, SMALL.images()["lr"])  # fills what is kept
    return net, untouched


def encodings(net, *lrs, **condition) -> int:
    """How often the encoder runs for samples of these images."""
    with mock.patch.object(NCSR, "features", autospec=True, side_effect=NCSR.features) as features:
        for lr in lrs:
            decode(net, lr, **condition)
    return features.call_count


def test_the_samples_of_an_image_share_one_encoding(pair):
    net, untouched = pair
    lr = SMALL.images()["lr"]
    assert encodings(net, lr, lr.clone(), lr[:]) == 0
    other = image(2, 3, 8, 10, seed=7)
    assert encodings(net, other, other, lr, lr) == 2
    assert relative_error(decode(net, lr), decode(untouched, lr)) <= 1e-6


def in_place(lr):
    lr[0, 0, 0, 0] += 0.5
    return lr


def through_data(lr):
    lr.data[0, 0, 0, 0] += 0.5
    return lr


def flipped_through_data(lr):
    lr.data.copy_(lr.flip(3))  # the same memory, count of changes and sum of bits
    return lr


def through_numpy(lr):
    lr.numpy()[0, 0, 0, 0] += 0.5
    return lr


@marked("slow", lambda change: change is not flipped_through_data)
@pytest.mark.parametrize("change", [in_place, through_data, flipped_through_data, through_numpy], ids=lambda f: f.__name__)
def test_changed_images(pair, change):
    net, untouched = pair
    lr = SMALL.images(seed=5)["lr"]  # not yet seen: what is kept next is of this tensor
    before = decode(net, lr)
    lr = change(lr)
    after = decode(net, lr)
    assert relative_error(after, decode(untouched, lr)) <= 1e-6
    assert relative_error(after, before) > 1e-5


@pytest.mark.slow
def test_an_image_in_the_memory_of_one_that_is_gone(pair):
    net, untouched = pair
    memory = torch.empty(2, 3, 8, 10, dtype=torch.float64)
    for seed in (1, 2):
        lr = torch.frombuffer(memory.numpy(), dtype=torch.float64).view(2, 3, 8, 10)
        lr.copy_(image(2, 3, 8, 10, seed=seed))
        assert relative_error(decode(net, lr), decode(untouched, lr)) <= 1e-6
        del lr


@pytest.mark.slow
def test_another_noise_condition(pair):
    net, untouched = pair
    lr, std = SMALL.images()["lr"], SMALL.images()["std"]
    for condition in ({"std": std}, {"std": std.flip(3)}, {"std": None}, SMALL.condition(), {"std": std}):
        assert relative_error(decode(net, lr, **condition), decode(untouched, lr, **condition)) <= 1e-6
    std[0, 0] += 1
    assert relative_error(decode(net, lr, std=std), decode(untouched, lr, std=std)) <= 1e-6
    assert encodings(net, lr, lr, std=std) == 0


def optimizer_step(net, **options):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, **options)
    net(**SMALL.images())[1].sum().backward()
    optimizer.step()


def fused_optimizer_step(net):
    optimizer_step(net, fused=True)


def load_state_dict(net):
    net.load_state_dict({name: value + 0.01 for name, value in net.state_dict().items()})


def weight_in_place(net):
    with torch.no_grad():
        net.flowUpsamplerNet.layers[LAYER].affine.fAffine[0].weight[0, 0, 0, 0] += 0.5


def encoder_weight_through_data(net):
    net.RRDB.conv_first.weight.data[0, 0, 0, 0] += 0.5


def encoder_in_bgr_through_data(net):
    weight = net.RRDB.conv_first.weight
    weight.data.copy_(weight.flip(1))  # the same memory, count of changes and sum of bits


def weight_replaced(net):
    layer = net.flowUpsamplerNet.layers[LAYER].actnorm
    layer.logs = torch.nn.Parameter(layer.logs.detach() + 0.1)


def dtype_and_back(net):
    net.float().double()


@marked("slow", lambda change: change not in (weight_in_place, encoder_in_bgr_through_data))
@pytest.mark.parametrize(
    "change",
    [
        optimizer_step, fused_optimizer_step, load_state_dict, weight_in_place, encoder_weight_through_data,
        encoder_in_bgr_through_data, weight_replaced, dtype_and_back,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_changed_weights(pair, change):
    net, untouched = pair
    lr = SMALL.images()["lr"]
    before = decode(net, lr)
    for one in (net, untouched):
        change(one)
    after = decode(net, lr)
    assert relative_error(after, decode(untouched, lr)) <= 1e-6
    assert relative_error(after, before) > 1e-9


@pytest.mark.slow
def test_another_dtype(pair):
    net, untouched = pair
    lr = SMALL.images()["lr"]
    for dtype in (torch.float32, torch.float64):
        for one in (net, untouched):
            one.to(dtype)
        found, expected = decode(net, lr.to(dtype)), decode(untouched, lr.to(dtype))
        assert found.dtype == dtype and relative_error(found, expected) <= (1e-6 if dtype == torch.float64 else 2e-5)


def test_training_lets_go_of_what_was_kept(pair):
    net, untouched = pair
    lr = SMALL.images()["lr"]
    engine = net.__dict__["forward"].__self__._engines[True]
    kept = weakref.ref(engine._cached[1])
    net(**SMALL.images())[1].sum().backward()
    assert engine._cached is None and kept() is None
    (idle,) = engine._idle
    assert all(parameter.is_meta for parameter in idle.model.parameters())
    assert relative_error(decode(net, lr), decode(untouched, lr)) <= 1e-6
    assert encodings(net, lr) == 0


@pytest.mark.slow
def test_too_large_an_image_keeps_its_features_alone(pair, monkeypatch):
    monkeypatch.setattr("ncsr_fast.engine.memory._OF_CPU", 0)
    net, untouched = pair
    lr = SMALL.images()["lr"]
    assert relative_error(decode(net, in_place(lr)), decode(untouched, lr)) <= 1e-6
    assert encodings(net, lr) == 0
    assert not net.__dict__["forward"].__self__._engines[True]._cached[1]._image.levels._plans


def test_images_with_nan_are_computed_anew(pair):
    net, _ = pair
    lr = SMALL.images()["lr"]
    lr[0, 0, 0, 0] = torch.nan
    assert encodings(net, lr, lr) == 2
    assert decode(net, lr).isnan().any()


@pytest.mark.slow
@torch.inference_mode()
def test_networks_without_a_count_of_changes():
    net, untouched = twins(SMALL)
    net, untouched = (one.requires_grad_(False) for one in (net, untouched))
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    ncsr_fast.accelerate(net)
    lr = SMALL.images()["lr"]
    for _ in range(2):
        assert relative_error(decode(net, lr), decode(untouched, lr)) <= 1e-6
        for one in (net, untouched):
            one.RRDB.conv_first.weight.data += 0.1
