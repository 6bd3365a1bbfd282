"""The flows of the family against what the published programs computed (tests/conformance/family/)."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from operator_cases import marked
from support import Case, relative_error, vector_file, weights_module
from vectors import GRADIENT, VALUE, every_dtype, published_gradients

import ncsr_fast
from ncsr_fast import NCSR

DEEP = ["srflow_da_x4_small", "srflow_da_r_x4_small", "srflow_da_d_x4_small", "srflow_da_s_x4_small", "srflow_da_x8_small"]
LOW_LIGHT = ["llflow_smallnet_small", "llflow_small"]
CASES = [*DEEP, "ctflow_small", *LOW_LIGHT, "fs_ncsr_x4_small"]
every_case = pytest.mark.parametrize("name", CASES, scope="module")
# networks and encoders of both kinds, at the least cost
slow_but_for_two = marked("slow", lambda name: name not in ("srflow_da_r_x4_small", "ctflow_small"))
# tests/flow/test_family_models.py has the ways to evaluate a level against one another
slow_but_for_fused = marked("slow", lambda engine: engine != "fused")
# a mistake in float32 alone is in the engine's kernels; the reference has none of its own
exhaustive_in_reference = marked("exhaustive", lambda dtype, engine: dtype == torch.float32 and engine == "plain")
low_light_cases = pytest.mark.parametrize("name", LOW_LIGHT, scope="module")
ENGINES = {"fused": {}, "stored": {"checkpoint": False}, "plain": {"engine": "plain"}}


class FamilyCase(Case):
    """One flow of the family, whose images in the vectors are what the flow sees."""

    def weights(self) -> dict[str, torch.Tensor]:
        filled = weights_module("family").fill(self.meta["shapes"], self.meta["seed"], self.meta["gains"])
        return {name: torch.from_numpy(np.asarray(value)) for name, value in filled.items()}

    def batch(self, prefix: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
        names = [f"{prefix}_hr", f"{prefix}_lr", *([f"{prefix}_noise"] if f"{prefix}_noise" in self.arrays else [])]
        return tuple(self.tensor(name, dtype) for name in names)

    def condition(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The LR images of the sample in the vectors."""
        return self.tensor("eval_clean_lr" if "eval_clean_lr" in self.arrays else "eval_lr", dtype)


@functools.lru_cache(maxsize=1)
def case(name: str) -> FamilyCase:
    with np.load(vector_file(f"family/{name}.npz")) as arrays:
        return FamilyCase(name, json.loads(vector_file(f"family/{name}.json").read_text()), dict(arrays))


@functools.lru_cache(maxsize=1)
def published(name: str) -> dict[str, torch.Tensor]:
    """The published state dict of a case, actnorms from the vectors."""
    vectors, weights = case(name), case(name).weights()
    for key, value in zip(vectors.meta["actnorm_names"], vectors.tensor("actnorm").split(vectors.meta["actnorm_sizes"])):
        weights[key] = value.reshape(weights[key].shape)
    return weights


@functools.lru_cache(maxsize=1)
def loaded(name: str, dtype: torch.dtype) -> NCSR:
    """The model of a case, shared: a test changes nothing of it but gradients and options."""
    return ncsr_fast.from_published(case(name).meta["options"], published(name)).to(dtype)


@slow_but_for_two
@every_dtype
@every_case
def test_actnorm_initialisation(name, dtype):
    vectors = case(name)
    weights = published(name) | {key: torch.zeros_like(published(name)[key]) for key in vectors.meta["actnorm_names"]}
    model = ncsr_fast.from_published(vectors.meta["options"], weights).to(dtype)
    assert not model.actnorm_initialized
    nll = model.initialize(*vectors.batch("init", dtype))
    state = model.published_state_dict()
    actnorms = torch.cat([state[key].flatten() for key in vectors.meta["actnorm_names"]])
    assert model.actnorm_initialized
    assert relative_error(actnorms, vectors.tensor("actnorm")) < VALUE[dtype]
    assert relative_error(nll, vectors.tensor("init_nll")) < VALUE[dtype]


@slow_but_for_two
@slow_but_for_fused
@exhaustive_in_reference
@pytest.mark.parametrize("engine", ["fused", "plain"])
@every_dtype
@every_case
def test_likelihood_and_latents(name, dtype, engine):
    vectors, model = case(name), loaded(name, dtype)
    model.engine = engine
    hr, lr, *noise = vectors.batch("eval", dtype)
    with torch.no_grad():
        encoded, nll = model.encode(hr, lr, *noise), model.nll(hr, lr, *noise)
    assert relative_error(nll, vectors.tensor("nll")) < VALUE[dtype]
    expected = vectors.latents("latent")
    assert len(encoded.latents) == len(expected)
    for latent, target in zip(encoded.latents, expected):
        assert relative_error(latent, target) < VALUE[dtype]
    if "prior_mean" in vectors.arrays:
        assert relative_error(encoded.prior_mean, vectors.tensor("prior_mean")) < VALUE[dtype]


@slow_but_for_two
@slow_but_for_fused
@pytest.mark.parametrize("engine", ENGINES)
@every_case
def test_gradients(name, engine):
    """Of the images and of every parameter, by every way to evaluate a level."""
    vectors, model = case(name), loaded(name, torch.float64)
    model.options = type(model.options)(**ENGINES[engine])
    assert_gradients(vectors, model, "", "condition")


@pytest.mark.slow
@low_light_cases
def test_gradients_with_the_mean_of_the_reference(name):
    vectors, model = case(name), loaded(name, torch.float64)
    with torch.no_grad():
        nll = model.nll(*vectors.batch("eval"), prior="reference")
    assert relative_error(nll, vectors.tensor("reference_nll")) < VALUE[torch.float64]
    assert_gradients(vectors, model, "reference_", "reference")


def assert_gradients(vectors: FamilyCase, model: NCSR, prefix: str, prior: str) -> None:
    hr, lr, *noise = vectors.batch("eval")
    hr.requires_grad_()
    lr.requires_grad_()
    model.zero_grad()
    model.nll(hr, lr, *noise, prior=prior).mean().backward()
    assert relative_error(hr.grad, vectors.tensor(f"{prefix}grad_hr")) < GRADIENT
    assert relative_error(lr.grad, vectors.tensor(f"{prefix}grad_lr")) < GRADIENT
    gradients, names = published_gradients(model), vectors.meta[f"{prefix}grad_names"]
    assert sorted(gradients) == sorted(names)
    probes = [weights_module("family").normal("probe:" + key, gradients[key].shape, vectors.meta["seed"]) for key in names]
    probes = [torch.from_numpy(probe) for probe in probes]
    norms, expected = torch.stack([gradients[key].norm() for key in names]), vectors.tensor(f"{prefix}grad_norm")
    assert ((norms - expected).abs() <= GRADIENT * expected).all()
    # a sum or dot product cancels, so its error is measured against what it could have been
    sums = torch.stack([gradients[key].sum() for key in names])
    count = torch.tensor([gradients[key].numel() for key in names]).sqrt()
    assert ((sums - vectors.tensor(f"{prefix}grad_sum")).abs() <= GRADIENT * norms * count).all()
    dots = torch.stack([(gradients[key] * probe).sum() for key, probe in zip(names, probes)])
    length = torch.stack([probe.norm().sqrt().clamp(min=1) for probe in probes])
    assert ((dots - vectors.tensor(f"{prefix}grad_dot")).abs() <= GRADIENT * norms * length).all()


@slow_but_for_two
@slow_but_for_fused
@exhaustive_in_reference
@pytest.mark.parametrize("engine", ["fused", "plain"])
@every_dtype
@every_case
def test_decoding(name, dtype, engine):
    vectors, model = case(name), loaded(name, dtype)
    model.engine = engine
    lr, latents = vectors.condition(dtype), vectors.latents("sample_latent", dtype)
    with torch.no_grad():
        found = model.decode(latents, lr)
        _, logdet = model.conditioned_levels(lr).decode(latents, None)
    assert relative_error(found, vectors.tensor("sample_residual" if model.flow.base else "sample")) < VALUE[dtype]
    if not model.flow.base:
        assert relative_error(logdet, vectors.tensor("sample_logdet")) < VALUE[dtype]


@slow_but_for_two
@every_case
def test_state_dict_there_and_back(name):
    vectors, weights, state = case(name), published(name), loaded(name, torch.float64).published_state_dict()
    assert list(state) == list(vectors.meta["shapes"])
    for key, value in state.items():
        assert list(value.shape) == vectors.meta["shapes"][key]
        assert torch.equal(value, weights[key]), key


@pytest.mark.slow
@low_light_cases
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


@slow_but_for_two
@pytest.mark.parametrize("name", DEQUANTISATION, scope="module")
def test_likelihood_of_dequantised_images(name):
    vectors, model, (noise, nats) = case(name), loaded(name, torch.float64), DEQUANTISATION[name]
    hr, lr = vectors.batch("eval")
    with torch.no_grad():
        found = model.nll(hr + noise(vectors.tensor("dequantisation_draw")), lr) + nats / math.log(2)
    assert relative_error(found, vectors.tensor("dequantised_nll")) < VALUE[torch.float64]
