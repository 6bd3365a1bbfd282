"""PSNR, LR-PSNR, SSIM, diversity and LPIPS."""

from __future__ import annotations

import math

import pytest
import torch
from lpips_networks import random_network
from support import image

from ncsr_fast import metrics


def test_psnr_is_that_of_eight_bits():
    a = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    b = torch.tensor([10, 23, 26], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = 10 * math.log10(255**2 / ((0 + 9 + 16) / 3))
    assert metrics.psnr(a, b).item() == pytest.approx(expected)
    # a float a third of a level off is the same 8-bit image, and values outside [0, 1] are clipped
    assert metrics.psnr(a / 255 + 0.3 / 255, b).item() == pytest.approx(expected)
    assert metrics.psnr(torch.full((1, 3, 2, 2), 1.4), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).item() == math.inf


def test_psnr_is_per_image():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[1] += 1
    values = metrics.psnr(a, b)
    assert values[0] == math.inf and values[1].item() == pytest.approx(20 * math.log10(255))
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.psnr(a, b[:, :, :2])


def test_lr_psnr_of_a_consistent_image_is_infinite():
    hr = metrics.to_uint8(image(2, 3, 16, 24))
    lr = metrics.imresize(hr, 1 / 4)
    assert (metrics.lr_psnr(hr, lr, 4) == math.inf).all()
    lr[1, 0, 0, 0] ^= 4  # one value of 72 changed by four levels
    assert metrics.lr_psnr(hr, lr, 4)[1].item() == pytest.approx(10 * math.log10(255**2 / (16 / 72)))


@pytest.mark.parametrize("height, width", [(7, 9), (23, 40), (70, 31)])
def test_ssim_is_scikit_images(height, width):
    """Of noise, of smooth pictures, and of an image and its like."""
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a = torch.cat([metrics.to_uint8(image(1, 3, height, width)), torch.full((1, 3, height, width), 200, dtype=torch.uint8)])
    for b in (a, 255 - a, (a.int() + torch.arange(width) % 5).clamp(0, 255).to(torch.uint8), torch.zeros_like(a)):
        pairs = [[picture.permute(1, 2, 0).numpy() for picture in pair] for pair in zip(a, b)]
        expected = [similarity(x, y, channel_axis=2, data_range=255) for x, y in pairs]
        assert metrics.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_small_images():
    with pytest.raises(ValueError, match=r"ssim needs sides of at least 7, not \(6, 9\)"):
        metrics.ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


def test_eight_bits():
    x = torch.tensor([-0.5, 0.0, 0.9 / 255, 1.4 / 255, 1.6 / 255, 254.7 / 255, 1.0, 7.0])
    assert metrics.to_uint8(x).tolist() == [0, 0, 1, 1, 2, 255, 255, 255]
    assert metrics.to_uint8(x, "truncate").tolist() == [0, 0, 0, 1, 1, 254, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(metrics.to_uint8(levels, "truncate"), levels)
    with pytest.raises(ValueError, match="to_8bit must be one of 'round', 'truncate', not 'ceil'"):
        metrics.to_uint8(levels, "ceil")


def test_truncation_is_that_of_the_published_programs():
    """NumPy's, in float32."""
    import numpy as np

    x = image(3, 40, 50, dtype=torch.float32) * 1.2 - 0.1
    x[0, 0] = torch.arange(50) / 255
    expected = (np.clip(x.numpy(), 0, 1) * 255).astype(np.uint8)
    assert torch.equal(metrics.to_uint8(x, "truncate"), torch.from_numpy(expected))


def test_truncation_costs_decibels_of_consistency():
    """A sample 51 dB from the LR image, once rounded and once truncated."""
    smooth = (torch.arange(64)[:, None] + torch.arange(64)).div(160.0).expand(1, 3, 64, 64)
    noise = 0.01 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lr = metrics.imresize(metrics.to_uint8(smooth + 0.1), 1 / 4)
    found = [float(metrics.lr_psnr(metrics.to_uint8(smooth + 0.1 + noise, rule), lr, 4)) for rule in ("round", "truncate")]
    assert found[0] - found[1] > 1


def test_diversity_score_by_hand():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[3.0, 1.0], [4.0, 4.0]]])
    # means 2 and 3; pixelwise minima 1, 1, 2, 2 with mean 1.5
    assert metrics.diversity_score(maps) == pytest.approx(25.0)
    assert metrics.diversity_score(maps[:1]) == 0
    assert metrics.diversity_score(torch.zeros(3, 2, 2)) == 0
    with pytest.raises(ValueError, match=r"distances must have shape \(n, H, W\)"):
        metrics.diversity_score(maps[0])


def test_error_maps():
    samples, target = torch.zeros(2, 3, 4, 6), torch.zeros(3, 4, 6)
    samples[1, :, :2, :2] = 1
    maps = metrics.error_maps(samples, target, window=2)
    assert maps.shape == (2, 2, 3) and maps[0].sum() == 0
    assert maps[1].tolist() == [[1, 0, 0], [0, 0, 0]]


@pytest.fixture
def lpips_network():
    """LPIPS with a random backbone, whose weights would be a download."""
    return random_network()


@pytest.mark.slow
def test_lpips_maps(lpips_network):
    target = image(3, 64, 64, dtype=torch.float32)
    samples = torch.stack([target, 1 - target])
    maps = metrics.lpips(samples, target, lpips_network)
    assert maps.shape == (2, 64, 64)
    assert maps[0].abs().max() == 0 and maps[1].mean() > 0
    alone = lpips_network(2 * samples[1:] - 1, 2 * target[None] - 1)[0, 0]
    assert torch.allclose(maps[1], alone, atol=1e-6)


@pytest.mark.slow
def test_lpips_of_any_number_of_samples_is_that_of_the_package(lpips_network):
    """Features of the original are computed once, those of samples a batch at a time, 3×3 convolutions by our kernels."""
    target, samples = image(3, 70, 93, dtype=torch.float32), image(3, 3, 70, 93, seed=1, dtype=torch.float32)
    reference = metrics.LPIPSReference(target, lpips_network)
    with torch.no_grad():
        expected = lpips_network(2 * samples - 1, (2 * target - 1).expand_as(samples))[:, 0]
    assert torch.allclose(reference(samples), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(reference(samples[1:2]), expected[1:2], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_digest_of_weights(lpips_network):
    before = metrics.lpips_digest(lpips_network)
    assert before == metrics.lpips_digest(random_network()) and len(before) == 64
    with torch.no_grad():
        lpips_network.net.slice3[1].weight[0, 0, 0, 0] += 1e-3
    assert metrics.lpips_digest(lpips_network) != before
    assert metrics.lpips_digest(lambda a, b: a) is None


def test_lpips_says_why_it_is_not_there(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(metrics.LPIPSUnavailable, match=r"pip install 'ncsr_fast\[eval\]'"):
        metrics.lpips_model()
