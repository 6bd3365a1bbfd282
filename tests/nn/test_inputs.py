"""What bad input gets: an error that names the argument, what it was and what it should be."""

from __future__ import annotations

import pytest
import torch
from support import image, tiny_model

LR, HR = image(2, 3, 4, 6, seed=1), image(2, 3, 16, 24, seed=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


BAD_PAIRS = {
    "scale": ((HR[..., :-4], LR), ValueError, r"hr must have shape \(2, 3, 16, 24\) for lr .* scale 4, not \(2, 3, 16, 20\)"),
    "batch": ((HR[:1], LR), ValueError, r"hr must have shape \(2, 3, 16, 24\)"),
    "channels": ((HR, LR[:, :1]), ValueError, r"lr must have shape \(B, 3, H, W\), not \(2, 1, 4, 6\)"),
    "rank": ((HR, LR[0]), ValueError, r"lr must have shape \(B, 3, H, W\), not \(3, 4, 6\)"),
    "empty": ((HR, LR[..., :0]), ValueError, "lr must have shape"),
    "dtype": ((HR.float(), LR), TypeError, "hr must be torch.float64, the dtype of the model, not torch.float32"),
    "bytes": ((HR, LR.mul(255).byte()), TypeError, r"lr must be torch.float64.*not torch.uint8; images are floats in \[0, 1\]"),
    "device": ((HR.to("meta"), LR), ValueError, "hr is on meta, but the model is on cpu"),
    "list": ((HR, [1]), TypeError, "lr must be a tensor, not list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pair(model, name):
    (hr, lr), error, message = BAD_PAIRS[name]
    for method in (model.encode, model.nll, model.initialize):
        with pytest.raises(error, match=message):
            method(hr, lr)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_pixels_that_are_not_finite(model, value):
    lr, hr = LR.clone(), HR.clone()
    lr[1, 2, 0, 0] = hr[0, 0, 3, 3] = value
    for call in (lambda: model.sample(lr, n=1), lambda: model.nll(HR, lr)):
        with pytest.raises(ValueError, match="lr has 1 NaN or infinite values out of 144"):
            call()
    with pytest.raises(ValueError, match="hr has 1 NaN"):
        model.encode(hr, LR)


@pytest.mark.parametrize(
    "noise, message",
    [
        (
            torch.zeros(2, 1, 1, 1, dtype=torch.float64),
            r"noise must be the noise image, of shape \(2, 3, 16, 24\), not \(2, 1, 1, 1\)",
        ),
        (torch.zeros(2, 3, 4, 6, dtype=torch.float64), r"noise must be the noise image"),
        (torch.full_like(HR, torch.nan), "noise has 2304 NaN"),
    ],
    ids=["std", "lr-size", "nan"],
)
def test_bad_noise(model, noise, message):
    with pytest.raises(ValueError, match=message):
        model.nll(HR, LR, noise)


def test_noise_of_another_variant():
    with pytest.raises(ValueError, match=r"standard deviation of each image's noise, of shape \(2, 1, 1, 1\)"):
        tiny_model(noise_channels=1).nll(HR, LR, torch.zeros_like(HR))
    with pytest.raises(ValueError, match="no noise-conditional layer"):
        tiny_model(noise_channels=0, noise_steps=()).nll(HR, LR, torch.zeros_like(HR))


def test_bad_latents(model):
    latents = model.encode(HR, LR).latents
    with pytest.raises(ValueError, match="latents must be 2 tensors, not 1"):
        model.decode(latents[:1], LR)
    with pytest.raises(ValueError, match=r"latents\[0\] must have shape \(2, 6, 8, 12\), not \(2, 96, 2, 3\)"):
        model.decode(latents[::-1], LR)
    with pytest.raises(TypeError, match=r"latents\[1\] must be torch.float64"):
        model.decode([latents[0], latents[1].float()], LR)


@pytest.mark.parametrize(
    "arguments, message", [({"n": 0}, "n must be at least 1"), ({"temperature": -1.0}, "temperature must not")]
)
def test_bad_sampling(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample(LR, **arguments)


def test_singular_convolution(model):
    broken = tiny_model()
    with torch.no_grad():
        broken.levels[1].invconv[0, 0] = broken.levels[1].invconv[0, 1]
    with pytest.raises(ValueError, match="weight is singular"):
        broken.sample(LR, n=1)
