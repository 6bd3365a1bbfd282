"""Of the flows of the family what only their programs have (tests/conformance/family/); the rest is in test_conformance.py."""

from __future__ import annotations

import math

import pytest
import torch
from members import DEEP, FAST, LOW_LIGHT, case, loaded
from operator_cases import marked
from support import relative_error
from vectors import VALUE


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW_LIGHT, scope="module")
def test_the_published_sample_is_that_of_temperature_0(name):
    """Whose program has no temperature; here there is one, around the same mean."""
    vectors, model = case(name), loaded(name, torch.float64)
    lr, expected = vectors.tensor("eval_lr"), vectors.tensor("sample_mean")
    with torch.no_grad():
        assert relative_error(model.sample(lr, n=1, temperature=0)[:, 0], expected.clamp(0, 1)) < VALUE[torch.float64]
        levels = model.conditioned_levels(lr)
        found, logdet = levels.decode([levels.condition.prior_mean], None)
        assert relative_error(found, expected) < VALUE[torch.float64]
        assert relative_error(logdet, vectors.tensor("sample_mean_logdet")) < VALUE[torch.float64]


@pytest.mark.slow
def test_samples_of_fs_ncsr_are_images():
    """The decoded residual on the LR image enlarged; in 8 bits truncated, but for a value next to an integer."""
    vectors, model = case("fs_ncsr_x4_small"), loaded("fs_ncsr_x4_small", torch.float64)
    lr, latents = vectors.condition(), [latent[:, None] for latent in vectors.latents("sample_latent")]
    with torch.no_grad():
        found = model.condition(lr).sample(1, latents=latents)[:, 0]
    assert relative_error(found, vectors.tensor("sample_image").clamp(0, 1)) < VALUE[torch.float64]
    exact, expected = 255 * found[0].permute(1, 2, 0), vectors.tensor("eight_bit")
    near = (exact - exact.round()).abs() < 1e-4  # of an integer, or clipped
    assert torch.equal(exact.floor()[~near], expected[~near]) and (~near).double().mean() > 0.5


# by case, the noise that a program can add to its target, and what the likelihood then has beside it, in nats a position
DEQUANTISATION = {
    **dict.fromkeys(DEEP, (lambda draw: 4 / math.sqrt(3) / 255 * draw, 0.0)),
    **dict.fromkeys(["ctflow_small", *LOW_LIGHT], (lambda draw: (draw - 0.5) / 32, math.log(32))),
}


@marked("slow", lambda name: name not in FAST)
@pytest.mark.parametrize("name", DEQUANTISATION, scope="module")
def test_likelihood_of_dequantised_images(name):
    vectors, model, (noise, nats) = case(name), loaded(name, torch.float64), DEQUANTISATION[name]
    hr, lr = vectors.batch("eval")
    with torch.no_grad():
        found = model.nll(hr + noise(vectors.tensor("dequantisation_draw")), lr) + nats / math.log(2)
    assert relative_error(found, vectors.tensor("dequantised_nll")) < VALUE[torch.float64]
