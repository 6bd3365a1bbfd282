"""Encoding in tiles: latents and likelihoods equal to those of encoding whole, in less memory, whatever the tiles."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from flow.test_tiling import EXACT, MODELS, healthy, noise_for
from support import image, relative_error
from torch import Tensor
from variants import BRANCHES, FLOW, NOISY, model_of

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.engine import tiles
from ncsr_fast.engine.condition import Features
from ncsr_fast.engine.plain import plan
from ncsr_fast.flow.conditioned import Encoded, Levels
from ncsr_fast.memory import peak_bytes


def pair(model: NCSR, *size: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """An HR image and an LR image."""
    flow = model.flow
    hr = image(batch, flow.channels, *(flow.scale * side for side in size), seed=4)
    return hr, image(batch, flow.lr_channels, *size, seed=1)


def assert_equal(found: Encoded, expected: Encoded) -> None:
    assert relative_error(found.log_likelihood, expected.log_likelihood) < EXACT
    for latent, wanted in zip(found.latents, expected.latents, strict=True):
        assert latent.shape == wanted.shape and relative_error(latent, wanted) < EXACT


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tiles_change_nothing(name):
    model = healthy(**MODELS[name])
    hr, lr = pair(model, 5, 9, batch=2)
    noise = noise_for(model, lr)
    expected = model.encode(hr, lr, noise)
    assert_equal(model.encode(hr, lr, noise, tile=3), expected)
    assert relative_error(model.nll(hr, lr, noise, tile=2), model.nll(hr, lr, noise)) < EXACT


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (23, 2), (17, 15)])
@torch.no_grad()
def test_borders_and_sizes(size):
    model = healthy()
    hr, lr = pair(model, *size)
    noise = noise_for(model, lr)
    flow = model.condition(lr)
    expected = flow.encode(hr, noise)
    for side in (4,) if min(size) > 9 else (1, 4, 100):
        assert_equal(flow.encode(hr, noise, tile=side), expected)
    assert relative_error(flow.log_prob(hr, noise, tile=4), expected.log_likelihood) < EXACT


@pytest.mark.parametrize("engine", ["fused", "plain"])
@torch.no_grad()
def test_a_flow_of_ones_own_in_tiles(engine):
    """Other branches in another order, a level without a split, a level without features, a prior's mean."""
    model = model_of(engine=engine)
    hr, lr = pair(model, 6, 10)
    hr = torch.cat([hr, hr.flip(3)])
    flow = model.condition(lr.expand(2, -1, -1, -1))
    noise = 0.1 * image(2, 3, 12, 20, seed=9)
    expected = flow.encode(hr, noise)
    assert expected.prior_mean is not None
    for side in (1, 5):
        assert_equal(flow.encode(hr, noise, tile=side), expected)


ROUNDING = 1e-14  # what one pixel at the end of a chain of convolutions with small weights does is more


def wrong(levels: Levels, index: int, margin: int) -> float:
    """The error of the encoding of a row of a level from so many rows above it and all below."""
    level, features = levels.levels[index], levels.condition.features[index].whole.joined
    height, width = features.shape[2:]
    x = image(1, level.channels // level.squeeze**2, level.squeeze * height, level.squeeze * width, seed=2)
    row = height - 1
    part = plan(level, Features(features[:, :, row - margin :]), levels.options, inverse=False)
    z, latent, _ = part.encode(x[:, :, level.squeeze * (row - margin) :], None, (slice(margin, margin + 1), slice(None)))
    wanted = plan(level, Features(features), levels.options, inverse=False).encode(x)
    pairs = zip([z] if latent is None else [z, latent], wanted)
    return max(relative_error(found, expected[:, :, row:]) for found, expected in pairs)


LARGE, SMALL = (replace(FLOW.levels[0], branches=(BRANCHES[0], NOISY), split_channels=count) for count in (8, 4))
FLOWS = {
    "ncsr-x4": lambda: healthy(**MODELS["ncsr-x4"]),
    "two steps": lambda: healthy(**MODELS["two steps"]),
    "a large split": lambda: model_of(replace(FLOW, levels=(LARGE, FLOW.levels[1]))),
    "a small split": lambda: model_of(replace(FLOW, levels=(SMALL, FLOW.levels[1]))),
}


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_the_halo_is_as_wide_as_it_must_be(name):
    """Every pixel in it counts, and none outside: of channels that couplings change a split's mean reaches farther."""
    model = FLOWS[name]()
    levels = model.conditioned_levels(image(1, 3, 32, 4, seed=1))
    for index, level in enumerate(model.levels):
        halo = tiles.halo(level, inverse=False)
        assert wrong(levels, index, halo) < ROUNDING < wrong(levels, index, halo - 1), index


def test_gradients():
    """Tiles have none: a number is refused where they are recorded, "auto" is whole."""
    model = healthy()
    hr, lr = pair(model, 4, 6)
    with pytest.raises(ValueError, match=r"tile=2 is for encoding without gradients: call it under torch.no_grad\(\)"):
        model.encode(hr, lr, tile=2)
    expected = torch.autograd.grad(model.nll(hr, lr).sum(), model.levels[0].invconv)
    assert torch.equal(torch.autograd.grad(model.nll(hr, lr, tile="auto").sum(), model.levels[0].invconv)[0], expected[0])
    model.requires_grad_(False)
    for own, noise in ((hr.clone().requires_grad_(), None), (hr, torch.zeros_like(hr).requires_grad_())):
        with pytest.raises(ValueError, match="tile=2 is for encoding without gradients"):
            model.encode(own, lr, noise, tile=2)
    with pytest.raises(ValueError, match="tile must be"):
        model.encode(hr, lr, tile=0)


@torch.no_grad()
def test_less_memory_than_was_there_makes_smaller_tiles():
    model = healthy()
    hr, lr = pair(model, 16, 16)
    expected, plan = model.encode(hr, lr), Levels.plan

    def limited(levels, index, inverse):
        if index == 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")
        return plan(levels, index, inverse)

    with mock.patch.object(Levels, "plan", limited):
        with pytest.warns(RuntimeWarning, match="memory ran out at level 1, which is encoded in tiles of 16×16 of its pixels"):
            found = model.encode(hr, lr, tile="auto")
    assert_equal(found, expected)


@pytest.mark.slow
def test_memory():
    """Beyond what the tiles take, at most 150 bytes an HR pixel, as of samples."""
    full = NCSRConfig.preset("ncsr-compact-x4")
    config = replace(full, steps=1, noise_steps=(0, 1, 1), blocks=2, stacked_blocks=(0, 1))
    with torch.device("meta"):
        model = NCSR(config).eval().requires_grad_(False)
    peaks = []
    for height, width in ((64, 48), (128, 96)):
        hr, lr = (torch.empty(1, 3, side * height, side * width, device="meta") for side in (4, 1))
        peaks.append(peak_bytes(lambda hr=hr, lr=lr: model.encode(hr, lr, tile=16)))
    assert (peaks[1] - peaks[0]) / (16 * (128 * 96 - 64 * 48)) <= 150
    assert peaks[1] < 0.5 * peak_bytes(lambda: model.encode(hr, lr))
