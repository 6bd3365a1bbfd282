"""The scores of `evaluate`: which samples they are of, and their table."""

from __future__ import annotations

import pytest
import torch
from support import image, tiny_model

from ncsr_fast.evaluation import Evaluation, evaluate, table
from ncsr_fast.metrics import diversity_score, imresize, lr_psnr, psnr, to_uint8


def squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Stands for an LPIPS network: inputs in [-1, 1], one map an image."""
    assert -1 <= a.min() < 0 and a.max() <= 1
    return (a - b).square().mean(dim=1, keepdim=True)


def test_scores_are_those_of_the_samples_of_the_seed():
    model = tiny_model(dtype=torch.float32)
    hr = to_uint8(image(3, 32, 40))
    bicubic, cold, warm = evaluate(model, [hr], [0.0, 0.7], n=3, seed=5, lpips_network=squared_error)
    lr = imresize(hr, 1 / 4)
    with torch.no_grad():
        samples = to_uint8(model.sample(lr[None] / 255, 3, 0.7, torch.Generator().manual_seed(5))[0])
    consistency = lr_psnr(samples, lr.expand(3, -1, -1, -1), 4)
    assert warm.means()["psnr"] == pytest.approx(float(psnr(samples, hr.expand_as(samples)).mean()))
    assert warm.means()["lr_psnr"] == pytest.approx(float(consistency.mean()))
    assert warm.means()["lr_psnr_worst"] == pytest.approx(float(consistency.min()))
    maps = squared_error(samples / 127.5 - 1, hr.expand_as(samples) / 127.5 - 1)[:, 0]
    assert warm.means()["lpips"] == pytest.approx(float(maps.mean()), rel=1e-5)
    assert warm.means()["lpips_diversity"] == pytest.approx(diversity_score(maps), rel=1e-4)
    assert cold.means()["diversity"] == 0 and bicubic.means()["psnr"] > cold.means()["psnr"]
    assert "seconds" in cold.means() and "seconds" not in bicubic.means()


def test_scores_are_means_over_images():
    model = tiny_model(dtype=torch.float32)
    images = [to_uint8(image(3, 32, 40, seed=seed)) for seed in (1, 2)]
    together = evaluate(model, images, [0.0])
    alone = [evaluate(model, [one], [0.0]) for one in images]
    for method in range(2):
        values = [scores[method].means()["ssim"] for scores in alone]
        assert together[method].means()["ssim"] == pytest.approx(sum(values) / 2)


def test_table():
    scores = evaluate(tiny_model(dtype=torch.float32), [to_uint8(image(3, 32, 40))], [0.0, 0.5], n=2)
    header, *lines = table(scores).splitlines()
    assert "LR-PSNR dB" in header and "LPIPS" not in header
    assert [line.split("  ")[0] for line in lines] == ["bicubic", "temperature 0", "temperature 0.5"]
    assert len({len(line) for line in (header, *lines)}) == 1
    assert lines[0].rstrip().endswith("-"), "bicubic is not timed"


def test_as_many_lr_images_as_images():
    model = tiny_model(dtype=torch.float32)
    hr = to_uint8(image(3, 16, 16))
    for images, lr_images, said in (
        ([hr, hr], 1, "are 1 lr_images, but more images"),
        ([hr], 2, "1 images, but more lr"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(model, images, [0.0], lr_images=[imresize(hr, 1 / 4)] * lr_images)


def test_an_image_that_lpips_cannot_measure_leaves_the_scores_as_they_were():
    """Its network halves images some times; what is left of small ones is nothing."""

    def network(a, b):
        raise RuntimeError("Calculated output size (1x0x0) is too small")

    evaluation = Evaluation(tiny_model(dtype=torch.float32), [0.0], lpips_network=network)
    with pytest.raises(ValueError, match=r"LPIPS cannot measure images of 16×24 pixels: Calculated output"):
        evaluation.add(to_uint8(image(3, 16, 24)))
    assert evaluation.count == 0 and not any(scores.values for scores in evaluation.scores)
