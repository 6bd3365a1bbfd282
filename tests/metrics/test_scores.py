"""PSNR, LR-PSNR, SSIM, diversity and LPIPS."""

from __future__ import annotations

import math

import pytest
import torch
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


@pytest.mark.slow
def test_ssim():
    a = metrics.to_uint8(image(2, 3, 16, 16))
    assert metrics.ssim(a, a).tolist() == [1.0, 1.0]
    assert metrics.ssim(a, 255 - a).max() < 0


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
    """LPIPS with a random backbone, whose weights would be a download.

    lpips imports torchvision, whose compiled operators do not load with every torch: then those it registers kernels for at
    import are declared first.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import lpips as package
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import lpips as package
    torch.manual_seed(0)
    yield package.LPIPS(net="alex", spatial=True, pnet_rand=True, verbose=False).eval()
    del library


@pytest.mark.slow
def test_lpips_maps(lpips_network):
    target = image(3, 64, 64, dtype=torch.float32)
    samples = torch.stack([target, 1 - target])
    maps = metrics.lpips(samples, target, lpips_network)
    assert maps.shape == (2, 64, 64)
    assert maps[0].abs().max() == 0 and maps[1].mean() > 0
    alone = lpips_network(2 * samples[1:] - 1, 2 * target[None] - 1)[0, 0]
    assert torch.allclose(maps[1], alone, atol=1e-6)


def test_lpips_says_why_it_is_not_there(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(metrics.LPIPSUnavailable, match=r"pip install 'ncsr_fast\[eval\]'"):
        metrics.lpips_model()
