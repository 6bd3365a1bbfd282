"""Temperatures of samples: a number, one of each latent or level, a map of LR pixels; and latents that are given."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from support import image, tiny_model

from ncsr_fast import NCSR


@pytest.fixture(scope="module")
def model() -> NCSR:
    return tiny_model(scale=8, noise_steps=(0, 0, 1, 1)).requires_grad_(False)  # four levels, three latents


def drawn(model, lr, temperature, n=2):
    return model.condition(lr).draw(n, temperature, torch.Generator().manual_seed(3))


def test_of_each_latent_or_level(model):
    """A level without a split has none, and its number no effect."""
    lr = image(2, 3, 4, 6)
    unit = drawn(model, lr, 1)
    assert len(unit) == 3 and len(model.levels) == 4
    for temperature in ([0.5, 2, 0], (0.5, 2, 7, 0), torch.tensor([0.5, 2.0, 0.0])):
        for z, one, factor in zip(drawn(model, lr, temperature), unit, (0.5, 2, 0), strict=True):
            assert torch.equal(z, factor * one)
    given = model.sample(lr, 2, latents=drawn(model, lr, [0.1, 0.2, 0.3]), on_nonfinite="ignore")
    options = {"generator": torch.Generator().manual_seed(3), "on_nonfinite": "ignore"}
    assert torch.equal(model.sample(lr, 2, [0.1, 0.2, 0.3], **options), given)


@pytest.mark.parametrize("batch, size", [(1, (4, 6)), (2, (5, 7))])
def test_a_map(model, batch, size):
    """Of each latent pixel its LR pixel's, and of one that is larger the mean; padded as images are."""
    lr, heat = image(2, 3, *size), 0.1 + image(batch, 1, *size, seed=4)
    unit, found = drawn(model, lr, 1.0), drawn(model, lr, heat)
    padded = torch.nn.functional.pad(heat, (0, size[1] % 2, 0, size[0] % 2), mode="reflect")
    for z, one in zip(found, unit):
        cell = z.shape[-1] / padded.shape[-1]
        if cell >= 1:
            expected = padded.repeat_interleave(int(cell), 2).repeat_interleave(int(cell), 3)
        else:
            expected = torch.nn.functional.avg_pool2d(padded, round(1 / cell))
        torch.testing.assert_close(z, one * expected[:, None], rtol=1e-12, atol=0)
    flat = drawn(model, lr, torch.full((1, 1, *size), 0.7, dtype=lr.dtype))
    assert all(torch.allclose(z, 0.7 * one, rtol=1e-12, atol=0) for z, one in zip(flat, unit))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights samples may blow up, and are drawn again at their temperatures
        assert model.sample(lr, 1, 1e9 * heat, on_nonfinite="retry").shape == (2, 1, 3, 8 * size[0], 8 * size[1])


@pytest.mark.parametrize(
    "temperature, error, message",
    [
        ([0.5, 0.5], ValueError, "one number, or 3, one of each latent, or 4, one of each level, not 2"),
        ([0.5, -1, 0.5], ValueError, "a number of 0 or more, not -1"),
        ([0.5, "1", 0.5], TypeError, "must be a number, not '1'"),
        (torch.ones(2, 2), ValueError, r"a temperature map must have shape \(1 or 1, 1, 4, 6\), that of lr, not \(2, 2\)"),
        (torch.ones(1, 1, 6, 4), ValueError, r"that of lr, not \(1, 1, 6, 4\)"),
        (torch.ones(1, 1, 4, 6, dtype=torch.int64), TypeError, "must be of floats, not torch.int64"),
        (torch.full((1, 1, 4, 6), -0.1), ValueError, "must have finite values of 0 or more"),
        (torch.full((1, 1, 4, 6), math.nan), ValueError, "must have finite values of 0 or more"),
    ],
)
def test_what_a_temperature_may_not_be(model, temperature, error, message):
    with pytest.raises(error, match=message):
        model.sample(image(1, 3, 4, 6), 1, temperature)


def test_what_latents_may_not_be(model):
    lr = image(1, 3, 4, 6)
    good = drawn(model, lr, 0.1, n=2)
    bad = {
        "latents must be 3 tensors, of the shapes .*, not 2": good[:2],
        r"latents must be 3 tensors, of the shapes .*, not one of shape \(1, 2": good[0],
        r"latents\[0\] must have shape \(1, 2, 6, 16, 24\), not \(2, 6, 16, 24\)": [z[0] for z in good],
        r"latents\[2\] must be torch.float64, the dtype of the model, not torch.float32": [*good[:2], good[2].float()],
    }
    for message, latents in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            model.sample(lr, 2, latents=latents)
    with pytest.raises(TypeError, match=r"latents\[1\] must be a tensor, not NoneType"):
        model.sample(lr, 2, latents=[good[0], None, good[2]])


def test_words_for_temperatures(model):
    """In what is said about samples that blew up."""
    lr = image(1, 3, 4, 6)
    broken = [torch.full_like(z, math.inf) for z in drawn(model, lr, 1)]
    with pytest.warns(RuntimeWarning, match="2 of 2 samples of the latents given blew up"):
        model.sample(lr, 2, latents=broken)
    for temperature, told in (
        (1e30, r"at temperature 1e\+30"),
        ([1e30, 0, 0], r"at temperatures 1e\+30, 0, 0"),
        (torch.full((1, 1, 4, 6), 1e30), r"at temperatures of a map, up to 1e\+30"),
    ):
        with pytest.warns(RuntimeWarning, match=told):
            model.sample(lr, 1, temperature)
