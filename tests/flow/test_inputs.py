"""What bad input gets: an error that names the argument, what it was and what it should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import image, tiny_model

from ncsr_fast.flow.samples import NonFiniteSamples

LR, HR = image(2, 3, 4, 6, seed=1), image(2, 3, 16, 24, seed=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


BAD_PAIRS = {
    "scale": ((HR[..., :-4], LR), ValueError, r"hr must have shape \(2, 3, 16, 24\) for lr .* scale 4, not \(2, 3, 16, 20\)"),
    "batch": ((HR[:1], LR), ValueError, r"hr must have shape \(2, 3, 16, 24\)"),
    "channels": ((HR, LR[:, :1]), ValueError, r"lr must have shape \(B, 3, H, W\), not \(2, 1, 4, 6\)"),
    "alpha": ((HR, LR[:, [0, 1, 2, 2]]), ValueError, r"not \(2, 4, 4, 6\); leave out the alpha channel$"),
    "rank": ((HR, LR[0]), ValueError, r"lr must have shape \(B, 3, H, W\), not \(3, 4, 6\)"),
    "empty": ((HR, LR[..., :0]), ValueError, r"lr must have shape .* at least one image and one pixel, not \(2, 3, 4, 0\)"),
    "no-image": ((HR[:0], LR[:0]), ValueError, r"lr must have shape .* at least one image and one pixel, not \(0, 3, 4, 6\)"),
    "0-255": ((HR, LR * 255), ValueError, r"lr has values from \d.* to 25\d.*; images are floats in \[0, 1\]: divide by 255"),
    "0-255-hr": ((HR * 255, LR), ValueError, r"hr has values from .*; images are floats in \[0, 1\]: divide by 255"),
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
    with pytest.raises(ValueError, match="not conditioned on noise"):
        tiny_model(noise_channels=0, noise_steps=()).nll(HR, LR, torch.zeros_like(HR))


def test_bad_latents(model):
    latents = model.encode(HR, LR).latents
    with pytest.raises(ValueError, match=r"latents must be 2 tensors, of the shapes \(2, 6, 8, 12\), \(2, 96, 2, 3\), not 1"):
        model.decode(latents[:1], LR)
    with pytest.raises(ValueError, match=r"latents\[0\] must have shape \(2, 6, 8, 12\), not \(2, 96, 2, 3\)"):
        model.decode(latents[::-1], LR)
    with pytest.raises(TypeError, match=r"latents\[1\] must be torch.float64"):
        model.decode([latents[0], latents[1].float()], LR)


@pytest.mark.parametrize("name, value", [("n", "3"), ("n", 2.0), ("n", True), ("temperature", "0.8"), ("temperature", None)])
def test_numbers_that_are_none(model, name, value):
    arguments = {name: value}
    kind = "whole number" if name == "n" else "number"
    with pytest.raises(TypeError, match=f"^{name} must be a {kind}, not {value!r}$"):
        model.sample(LR, **arguments)
    if name == "temperature":
        with pytest.raises(TypeError, match="temperature must be a number, not"):
            model.check_invertibility(LR, **arguments)


def test_numbers_of_other_libraries(model):
    assert model.sample(LR, n=np.int64(1), temperature=np.float32(0.5)).shape[:2] == (2, 1)
    assert model.sample(LR, n=1, temperature=torch.tensor(0.5)).shape[:2] == (2, 1)


def test_a_generator_wants_floats():
    with pytest.raises(TypeError, match=r"lr must be torch.float64.*not torch.uint8; images are floats in \[0, 1\]: convert"):
        tiny_model().encoder(LR.mul(255).byte())
    with pytest.raises(TypeError, match="lr must be a tensor, not list"):
        tiny_model().encoder([1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": 0}, "n must be at least 1"),
        ({"temperature": -1.0}, "temperature must be a number of 0 or more, not -1.0"),
        ({"temperature": float("inf")}, "temperature must be a number of 0 or more, not inf"),
    ],
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


def test_images_beside_0_to_1_are_images(model):
    """Noise is added to them, residuals have either sign, and what blew up is decoded to values on both sides."""
    for hr in (HR + torch.randn_like(HR), -HR, 8 * (HR - 0.5), 100 * (HR - 0.5)):
        model.nll(hr, LR + 0.5 * torch.randn_like(LR))


CAUSES = {
    "weights": "1 weights of the model are not finite, levels.1.actnorm_bias first, so no temperature helps",
    "pixels": r"lr has values from 0 to 2\d\d.*; images are floats in \[0, 1\]: divide by 255",
    "scales": "divided by a scale near zero.* Try a lower temperature",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_said_of_samples_that_blew_up(cause, monkeypatch):
    """The real cause; the range of pixels is read here only where it was not before, which is on a GPU."""
    model, lr = tiny_model(), LR
    monkeypatch.setattr("ncsr_fast.checks.reading_is_free", lambda tensor: False)
    if cause == "pixels":
        lr = 255 * (LR - LR.min())
    with torch.no_grad():
        if cause == "weights":
            model.levels[1].actnorm_bias[0] = torch.nan
        else:
            model.levels[0].actnorm_logs.fill_(-600)
    with pytest.raises(NonFiniteSamples, match=CAUSES[cause]):
        model.sample(lr, n=1, on_nonfinite="raise")
    with pytest.warns(RuntimeWarning, match=CAUSES[cause]):
        model.sample(lr, n=1, on_nonfinite="warn")
    with pytest.warns(RuntimeWarning, match=CAUSES[cause]):
        model.sample(lr, n=1, on_nonfinite="retry")


@pytest.mark.parametrize("on_nonfinite", ["warn", "retry"])
def test_samples_that_blew_up_are_numbered_from_the_first_on(model, on_nonfinite):
    latents = [torch.zeros(1, 3, *shape) for shape in model.latent_shapes(*LR.shape[2:])]
    latents[0][:, 1] = torch.inf
    latents = [latent.to(LR).expand(len(LR), *latent.shape[1:]) for latent in latents]
    with pytest.warns(RuntimeWarning, match=r"samples \(numbers 4 to 6\) of the latents given .* \(image 0, sample 5\)"):
        model.condition(LR).sample(3, latents=latents, on_nonfinite=on_nonfinite, first=4)
