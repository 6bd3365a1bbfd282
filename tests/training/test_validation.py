"""What is looked at in validation: the right images, and signs of an inverse that explodes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import image, tiny_model, tiny_settings

from ncsr_fast.data import ImageError, RandomCrops, degrade, read_image, write_image
from ncsr_fast.data.perturb import perturb
from ncsr_fast.metrics import lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.training.stages import EncoderStage, FlowStage
from ncsr_fast.training.validation import validation_pairs
from ncsr_fast.training.watch import health, sample_metrics


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32).eval()


def look(model, temperature: float = 0.5):
    lr = image(1, 3, 6, 7, dtype=torch.float32)
    hr = image(1, 3, 24, 28, seed=1, dtype=torch.float32)
    return sample_metrics(model, hr, lr, temperature, torch.Generator().manual_seed(3)), hr, lr


def test_of_a_sound_sample(model):
    (metrics, sr), hr, lr = look(model)
    expected = model.sample(lr, n=1, temperature=0.5, generator=torch.Generator().manual_seed(3))[0, 0]
    assert torch.equal(sr, expected)
    assert metrics["nonfinite"] == 0
    latents = [torch.zeros(1, *shape) for shape in model.latent_shapes(6, 7)]
    raw = model.decode(latents, lr)
    (calm, _), *_ = look(model, 0.0)
    assert calm["saturated"] == pytest.approx(float(((raw < 0) | (raw > 1)).float().mean()))


@torch.no_grad()
def test_eight_bits_are_those_of_the_settings(model):
    """Its metrics are of what the published programs would have written to a file, where the settings say so."""
    lr, hr = image(1, 3, 6, 7, dtype=torch.float32), image(1, 3, 24, 28, seed=1, dtype=torch.float32)
    for rule in ("round", "truncate"):
        metrics, sr = sample_metrics(model, hr, lr, 0.5, torch.Generator().manual_seed(3), rule)
        seen = to_uint8(sr[None], rule)
        assert metrics["psnr"] == float(psnr(seen, hr)) and metrics["lr_psnr"] == float(lr_psnr(seen, lr, 4))
        assert metrics["ssim"] == float(ssim(seen, hr))
        stage = FlowStage(model, tiny_settings("elsewhere", temperatures=(0.5,), max_std=0.0, to_8bit=rule))
        found, _ = stage.validate(hr, lr, torch.Generator().manual_seed(3))
        truncated, _ = sample_metrics(model, hr, lr, 0.5, _after_noise(model, hr, lr), rule)
        assert found["psnr@0.5"] == truncated["psnr"]
        encoder = EncoderStage(model, stage.settings)
        expected = psnr(to_uint8(model.encoder(lr).clamp(0, 1), rule), hr)
        assert encoder.validate(hr, lr, torch.Generator())[0]["psnr"] == float(expected)
    with pytest.raises(ValueError, match="to_8bit must be one of 'round', 'truncate', not 'floor'"):
        tiny_settings("elsewhere", to_8bit="floor")


def _after_noise(model, hr: torch.Tensor, lr: torch.Tensor) -> torch.Generator:
    """The generator of `validate` once the noise of the likelihood is drawn."""
    generator = torch.Generator().manual_seed(3)
    perturb(hr, lr, 0.0, generator, noise_channels=model.config.noise_channels)
    return generator


def test_of_one_that_overflows(model):
    with torch.no_grad():
        model.levels[0].actnorm_logs[1, 0] = -100.0  # decoding divides by exp(-100)
    (metrics, sr), *_ = look(model)
    assert 0.1 < metrics["nonfinite"] <= 1
    assert metrics["nonfinite"] == pytest.approx(float((~sr.isfinite()).float().mean()))


def test_of_one_that_is_far_too_bright(model):
    with torch.no_grad():
        model.levels[0].actnorm_bias[0] -= 5.0
    (metrics, _), *_ = look(model)
    assert metrics["saturated"] > 0.9 and metrics["nonfinite"] == 0


def test_health_names_the_smallest_scale(model):
    lr, generator = image(1, 3, 6, 6, dtype=torch.float32), torch.Generator()
    sound = health(model, lr, 0.5, generator)
    assert sound["smallest_scale"] > 0.1 and sound["round_trip"] < 1e-4
    with torch.no_grad():
        model.levels[1].actnorm_logs[0, 0] = -7.0
    assert 0 < health(model, lr, 0.5, generator)["smallest_scale"] <= 1.001 * math.exp(-7)


def test_pairs_are_the_middles_of_validation_images(photos):
    settings = tiny_settings("elsewhere", validation=str(photos), validation_images=2, validation_size=70)
    pairs = validation_pairs(settings, (), slice(None))
    assert list(pairs) == [0, 1]
    hr, lr = pairs[0]
    assert torch.equal(hr, read_image(photos / "a.png")[:, 16:80, 24:88]), "64 of 96 and 120, from a multiple of 8"
    assert torch.equal(lr, degrade(hr, 4))


def test_pairs_of_given_lr_images_lie_at_the_same_place(photos, tmp_path):
    for path in photos.rglob("*.png"):
        write_image(tmp_path / "lr" / path.relative_to(photos), read_image(path)[:, ::4, ::4])
    settings = tiny_settings(photos, lr_images=(str(tmp_path / "lr"),), validation_size=40)
    training = RandomCrops(photos, tmp_path / "lr", scale=4, crop=32).files
    for hr, lr in validation_pairs(settings, training, slice(None)).values():
        assert torch.equal(lr, hr[:, ::4, ::4])
    both = replace(settings, images=("a",), lr_images=(), validation=str(photos), validation_lr=str(tmp_path / "lr"))
    assert torch.equal(validation_pairs(both, (), slice(None))[2][1], lr)


def test_training_images_that_cannot_be_read_are_passed_over(photos):
    """Where a folder is named for validation, they are an error instead."""
    path = photos / "a.png"
    path.write_bytes(path.read_bytes()[:-200])  # found only when it is decoded
    settings = tiny_settings(photos, validation_images=2, validation_size=70)
    pairs = validation_pairs(settings, RandomCrops(photos, scale=4, crop=32).files, slice(None))
    assert torch.equal(pairs[0][0], read_image(photos / "b.png")[:, 16:80, 24:88]) and list(pairs) == [0, 1]
    with pytest.raises(ImageError, match="^validation: cannot read image '.*a.png'"):
        validation_pairs(replace(settings, validation=str(photos)), (), slice(None))


def test_processes_share_them(photos):
    settings = tiny_settings(photos)
    training = RandomCrops(photos, scale=4, crop=32).files
    whole = validation_pairs(settings, training, slice(None))
    shares = [validation_pairs(settings, training, slice(rank, None, 2)) for rank in range(2)]
    assert [list(share) for share in shares] == [[0, 2], [1]]
    assert all(torch.equal(pair[0], whole[number][0]) for share in shares for number, pair in share.items())
