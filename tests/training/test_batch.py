"""From bytes and random numbers to what a step is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import tiny_config, tiny_settings

from ncsr_fast import NCSRConfig
from ncsr_fast.data import degrade, equalize, to_float, to_pair
from ncsr_fast.metrics import imresize
from ncsr_fast.training.batch import Draws, augmented, prepare, stacked

HR = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SETTINGS = tiny_settings("unused", batch=8)
LOW = tiny_settings(
    "unused",
    batch=8,
    model=NCSRConfig.preset("llflow-compact"),
    lr_images=("dark",),
    encoder_steps=0,
    lr_noise=False,
    max_std=0.0,
)


def draws(step: int = 0, settings=SETTINGS, share: slice = slice(None)) -> Draws:
    return Draws.at_step(step, settings, torch.Generator(), share)


def test_a_step_has_its_own_numbers_and_always_the_same():
    first, again, next_one = draws(5), draws(5), draws(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    numbers = [(a, b) for a, b in zip(first._replace(reference=None), next_one) if a is not None]
    assert len(numbers) == 4 and not any(torch.equal(a, b) for a, b in numbers)
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
    assert not many.reference.any()
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
    assert torch.equal(batch.noisy_target, batch.hr + v) and torch.equal(batch.noise, v)
    assert torch.equal(batch.noisy_lr, batch.lr + imresize(v, 1 / 4))
    clean = prepare(HR, None, numbers, replace(SETTINGS, lr_noise=False))
    assert torch.equal(clean.noisy_lr, clean.lr) and torch.equal(clean.noisy_target, batch.noisy_target)


@pytest.mark.parametrize("channels, shape", [(0, None), (1, (8, 1, 1, 1)), (3, (8, 3, 32, 32))])
def test_the_condition_is_the_model_s(channels, shape):
    model = tiny_config(noise_channels=channels, noise_steps=(0, 1, 1) if channels else ())
    noise = prepare(HR, None, draws(), replace(SETTINGS, model=model)).noise
    assert (None if noise is None else tuple(noise.shape)) == shape


def test_the_reference_s_prior_is_drawn_for_a_whole_batch():
    settings = replace(LOW, reference_prior=0.3)
    drawn = [draws(step, settings).reference for step in range(400)]
    assert all(reference.shape == (8,) and reference.unique().numel() == 1 for reference in drawn)
    assert sum(bool(reference[0]) for reference in drawn) == pytest.approx(120, abs=35)
    never, always = (draws(3, replace(LOW, reference_prior=share)).reference for share in (0.0, 1.0))
    assert not never.any() and always.all()


def test_every_image_has_the_noise_of_srflow_da():
    settings, numbers = replace(SETTINGS, fixed_std=True, lr_noise=False, max_std=0.04), draws()
    batch = prepare(HR, None, numbers, settings)
    assert torch.equal(batch.noisy_target, batch.hr + torch.tensor(0.04) * numbers.noise)
    assert torch.equal(batch.noisy_lr, batch.lr)


def test_residuals_are_of_the_clean_base():
    numbers, settings = draws(), replace(SETTINGS, model=tiny_config(system="fs-ncsr"))
    batch = prepare(HR, None, numbers, settings)
    base = torch.nn.functional.interpolate(batch.lr, scale_factor=4, mode="bicubic")
    assert torch.equal(batch.target, batch.hr - base) and batch.target.min() < 0
    assert torch.equal(batch.noisy_target, batch.target + batch.noise) and not torch.equal(batch.noisy_lr, batch.lr)


def test_dark_crops_are_the_six_channels_of_their_whole_image():
    dark = HR // 5
    crops = {"hr": HR, "lr": dark, "equalized": equalize(dark).flip(2)}  # not what would be made of the crop
    numbers = draws()
    batch = prepare(HR, stacked(crops), numbers, LOW)
    turned = {name: augmented(crop, numbers) for name, crop in crops.items()}
    hr, lr = to_pair(turned, 1, "cpu")
    assert torch.equal(batch.noisy_target, hr) and torch.equal(batch.noisy_lr, lr) and lr.shape == (8, 6, 32, 32)
    assert batch.noise is None
