"""The noise of NCSR: its distribution, its LR counterpart, its condition."""

from __future__ import annotations

import pytest
import torch
from support import image

from ncsr_fast.data import perturb
from ncsr_fast.metrics import imresize

HR, LR = image(3, 3, 16, 24, seed=1), image(3, 3, 4, 6, seed=2)


def test_lr_noise_is_the_resized_hr_noise():
    hr, lr, noise = perturb(HR, LR, 0.05, torch.Generator().manual_seed(0))
    assert torch.equal(hr, HR + noise) and noise.abs().max() > 0
    assert torch.allclose(lr, LR + imresize(noise, 1 / 4), rtol=1e-14)


def test_the_generator_decides():
    draws = [perturb(HR, LR, 0.05, torch.Generator().manual_seed(seed))[2] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_deviations_are_uniform_and_the_condition_of_the_std_variant():
    count, side = 4000, 16
    hr, lr = torch.zeros(count, 3, side, side), torch.zeros(count, 3, side // 4, side // 4)
    noisy, _, std = perturb(hr, lr, 0.05, torch.Generator().manual_seed(0), noise_channels=1)
    assert std.shape == (count, 1, 1, 1) and std.min() >= 0 and std.max() <= 0.05
    # mean and deviation of U(0, M), to four standard errors
    assert abs(std.mean() - 0.025) < 4 * 0.05 / 12**0.5 / count**0.5
    assert abs(std.std() - 0.05 / 12**0.5) < 1e-3
    measured = noisy.std(dim=(1, 2, 3))
    assert ((measured / std.flatten()) - 1).abs().max() < 0.15, "each image has its own deviation (768 values: 2.6 % each)"
    same_noise = perturb(hr, lr, 0.05, torch.Generator().manual_seed(0))[2]
    assert torch.equal(noisy, same_noise)


def test_no_noise():
    hr, lr, noise = perturb(HR, LR, 0.0)
    assert torch.equal(hr, HR) and torch.equal(lr, LR) and not noise.any()


def test_bad_calls():
    with pytest.raises(ValueError, match="max_std must not be negative"):
        perturb(HR, LR, -1.0)
    with pytest.raises(ValueError, match="is not an integer multiple of lr"):
        perturb(HR[..., :-1], LR, 0.05)
    with pytest.raises(ValueError, match="is not an integer multiple of lr"):
        perturb(HR[:1], LR, 0.05)
