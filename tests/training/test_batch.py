"""From bytes and random numbers to what a step is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import tiny_config, tiny_settings

from ncsr_fast.data import degrade, to_float
from ncsr_fast.metrics import imresize
from ncsr_fast.training.batch import Draws, augmented, prepare

HR = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SETTINGS = tiny_settings("unused", batch=8)


def draws(step: int = 0, settings=SETTINGS, share: slice = slice(None)) -> Draws:
    return Draws.at_step(step, settings, torch.Generator(), share)


def test_a_step_has_its_own_numbers_and_always_the_same():
    first, again, next_one = draws(5), draws(5), draws(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, next_one))
    other = draws(5, replace(SETTINGS, seed=8))
    assert not torch.equal(first.noise, other.noise)


def test_shares_of_the_processes_are_those_of_one():
    parts = [draws(3, share=share) for share in (slice(0, 3), slice(3, 8))]
    assert all(torch.equal(torch.cat(pieces), whole) for *pieces, whole in zip(*parts, draws(3)))


def test_distributions():
    many = draws(0, replace(SETTINGS, batch=4000, crop=8))
    assert many.std.min() >= 0 and many.std.max() < 1 and many.std.mean() == pytest.approx(0.5, abs=0.02)
    assert many.noise.mean() == pytest.approx(0, abs=0.01) and many.noise.std() == pytest.approx(1, abs=0.01)
    assert many.flips.float().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.bincount(many.turns).tolist() == pytest.approx([1000] * 4, abs=120)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_augmentation_is_a_flip_and_quarter_turns(flip, turns):
    given = draws()._replace(flips=torch.tensor([flip] * 4 + [False] * 4), turns=torch.tensor([turns] * 4 + [0] * 4))
    found = augmented(HR, given)
    expected = torch.rot90(HR.flip(3) if flip else HR, turns, dims=(2, 3))
    assert torch.equal(found[:4], expected[:4]) and torch.equal(found[4:], HR[4:])


def test_augmentation_is_left_out_when_asked():
    given = draws(0, replace(SETTINGS, flip=False, rotate=False))
    assert torch.equal(augmented(HR, given), HR)
    assert not draws(0, replace(SETTINGS, flip=False)).flips.any()
    assert not draws(0, replace(SETTINGS, rotate=False)).turns.any()


def test_hr_and_lr_are_turned_alike():
    computed, given = prepare(HR, None, draws(), SETTINGS), prepare(HR, degrade(HR, 4), draws(), SETTINGS)
    assert (computed.lr - given.lr).abs().max() <= 1 / 255 + 1e-6, "bicubic of the turned is the turned bicubic, to rounding"
    assert torch.equal(computed.hr, given.hr)


def test_noise():
    numbers, batch = draws(), prepare(HR, None, draws(), SETTINGS)
    v = SETTINGS.max_std * numbers.std * numbers.noise
    assert torch.equal(batch.hr, to_float(augmented(HR, numbers)))
    assert torch.equal(batch.noisy_hr, batch.hr + v) and torch.equal(batch.noise, v)
    assert torch.equal(batch.noisy_lr, batch.lr + imresize(v, 1 / 4))
    clean = prepare(HR, None, numbers, replace(SETTINGS, lr_noise=False))
    assert torch.equal(clean.noisy_lr, clean.lr) and torch.equal(clean.noisy_hr, batch.noisy_hr)


@pytest.mark.parametrize("channels, shape", [(0, None), (1, (8, 1, 1, 1)), (3, (8, 3, 32, 32))])
def test_the_condition_is_the_model_s(channels, shape):
    model = tiny_config(noise_channels=channels, noise_steps=(0, 1, 1) if channels else ())
    noise = prepare(HR, None, draws(), replace(SETTINGS, model=model)).noise
    assert (None if noise is None else tuple(noise.shape)) == shape
