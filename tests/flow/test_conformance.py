"""Models against what the published programs computed (tests/conformance/README.md): NCSR, SRFlow and their family."""

from __future__ import annotations

import copy

import pytest
import torch
from members import FAMILY, FAST, FULL, LOW_LIGHT, MEMBERS, SMALL, Member, case, loaded, published
from operator_cases import marked, where
from support import relative_error
from vectors import GRADIENT, VALUE, every_dtype, published_gradients, unused_names

from ncsr_fast import NCSR

# of module scope, so that the tests of a network and dtype follow one another and share one model
every_case = pytest.mark.parametrize("name", MEMBERS, scope="module")
small_cases = pytest.mark.parametrize("name", SMALL, scope="module")
slow_but_for_few = marked("slow", lambda name: name not in FAST)
# full depth in float64 and a small network in float32 fail for what these would, and so do likelihood and decoding of both
exhaustive_at_full_depth = marked("exhaustive", lambda name, dtype: name == FULL and dtype == torch.float32)
# Other ways to evaluate a level, where the program is another one. tests/flow/test_family_models.py holds the fused engine to
# the plain one, and tests/engine/test_equivalence.py all of them to one another, in values and gradients.
ENGINES = {"fused": {}, "stored": {"checkpoint": False}, "plain": {"engine": "plain"}}
engines = pytest.mark.parametrize("engine", ENGINES)
engines_of_the_family = where(lambda name, engine: name in FAMILY or engine == "fused")
exhaustive_but_for_fused = marked("exhaustive", lambda engine: engine != "fused")


@pytest.fixture
def model(name, dtype, engine) -> NCSR:
    """The model of a case, which is evaluated in this way."""
    shared = loaded(name, dtype)
    shared.options = type(shared.options)(**ENGINES[engine])
    return shared


@slow_but_for_few
@exhaustive_at_full_depth
@every_dtype
@every_case
def test_actnorm_initialisation(name, dtype):
    vectors = case(name)
    weights = published(name) | {key: torch.zeros_like(published(name)[key]) for key in vectors.meta["actnorm_names"]}
    model = vectors.model(weights, dtype)
    assert not model.actnorm_initialized
    nll = model.initialize(*vectors.batch("init", dtype))
    state = model.published_state_dict()
    actnorms = torch.cat([state[key].flatten() for key in vectors.meta["actnorm_names"]])
    assert model.actnorm_initialized
    assert relative_error(actnorms, vectors.tensor("actnorm")) < VALUE[dtype]
    assert relative_error(nll, vectors.tensor("init_nll")) < VALUE[dtype]


@slow_but_for_few
@exhaustive_but_for_fused
@engines_of_the_family
@engines
@every_dtype
@every_case
def test_likelihood_and_latents(name, dtype, model):
    vectors = case(name)
    with torch.no_grad():
        batch = vectors.batch("eval", dtype)
        encoded, nll = model.encode(*batch), model.nll(*batch)
    assert relative_error(nll, vectors.tensor("nll")) < VALUE[dtype]
    expected = vectors.latents("latent")
    assert len(encoded.latents) == len(expected)
    for latent, target in zip(encoded.latents, expected):
        assert relative_error(latent, target) < VALUE[dtype]
    if "prior_mean" in vectors.arrays:
        assert relative_error(encoded.prior_mean, vectors.tensor("prior_mean")) < VALUE[dtype]


@slow_but_for_few
@exhaustive_but_for_fused
@engines_of_the_family
@engines
@pytest.mark.parametrize("dtype", [torch.float64], ids=["float64"], scope="module")
@every_case
def test_gradients(name, model):
    """Of the images and of every parameter."""
    assert_gradients(case(name), model, "", "condition")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW_LIGHT, scope="module")
def test_gradients_with_the_mean_of_the_reference(name):
    vectors, model = case(name), loaded(name, torch.float64)
    with torch.no_grad():
        nll = model.nll(*vectors.batch("eval"), prior="reference")
    assert relative_error(nll, vectors.tensor("reference_nll")) < VALUE[torch.float64]
    assert_gradients(vectors, model, "reference_", "reference")


def assert_gradients(vectors: Member, model: NCSR, prefix: str, prior: str) -> None:
    hr, lr, *noise = vectors.batch("eval")
    hr.requires_grad_()
    lr.requires_grad_()
    model.zero_grad()
    model.nll(hr, lr, *noise, prior=prior).mean().backward()
    assert relative_error(hr.grad, vectors.tensor(f"{prefix}grad_hr")) < GRADIENT
    assert relative_error(lr.grad, vectors.tensor(f"{prefix}grad_lr")) < GRADIENT
    gradients, names = published_gradients(model), vectors.meta[f"{prefix}grad_names"]
    assert sorted(gradients) == sorted(names)
    probes = vectors.probes({key: gradients[key].shape for key in names})
    norms, expected = torch.stack([gradients[key].norm() for key in names]), vectors.tensor(f"{prefix}grad_norm")
    assert ((norms - expected).abs() <= GRADIENT * expected).all()
    # a sum or dot product cancels, so its error is measured against what it could have been
    sums = torch.stack([gradients[key].sum() for key in names])
    count = torch.tensor([gradients[key].numel() for key in names]).sqrt()
    assert ((sums - vectors.tensor(f"{prefix}grad_sum")).abs() <= GRADIENT * norms * count).all()
    dots = torch.stack([(gradients[key] * probe).sum() for key, probe in zip(names, probes)])
    length = torch.stack([probe.norm().sqrt().clamp(min=1) for probe in probes])
    assert ((dots - vectors.tensor(f"{prefix}grad_dot")).abs() <= GRADIENT * norms * length).all()


@pytest.mark.exhaustive  # test_gradients has the fused engine at this depth, tests/engine/test_equivalence.py every engine
def test_gradients_of_the_engine_at_full_depth():
    """With and without stored activations, against the plain path step by step: every parameter and both images."""
    vectors, model = case(FULL), copy.deepcopy(loaded(FULL, torch.float64))
    hr, lr, noise = vectors.batch("eval")
    found = {}
    for name, options in ENGINES.items():
        model.options = type(model.options)(**options)
        model.zero_grad()
        images = [image.clone().requires_grad_() for image in (hr, lr)]
        model.nll(*images, noise).mean().backward()
        found[name] = [image.grad for image in images] + [p.grad for p in model.parameters() if p.grad is not None]
    for name in ("fused", "stored"):
        for gradient, expected in zip(found[name], found["plain"], strict=True):
            assert relative_error(gradient, expected) < 1e-6


@slow_but_for_few
@exhaustive_but_for_fused
@engines_of_the_family
@engines
@every_dtype
@every_case
def test_decoding(name, dtype, model):
    vectors = case(name)
    lr, latents = vectors.condition(dtype), vectors.latents("sample_latent", dtype)
    with torch.no_grad():
        found = model.decode(latents, lr)
        _, logdet = model.conditioned_levels(lr).decode(latents, None)
    assert relative_error(found, vectors.tensor("sample_residual" if model.flow.base else "sample")) < VALUE[dtype]
    if not model.flow.base:
        assert relative_error(logdet, vectors.tensor("sample_logdet")) < VALUE[dtype]


@slow_but_for_few
@every_dtype
@small_cases
def test_conditioning_features(name, dtype):
    vectors, model = case(name), loaded(name, dtype)
    _, lr, _ = vectors.batch("eval", dtype)
    with torch.no_grad():
        features = model.encoder.features(lr[:1])
    recorded = {"feature_fea_up2": -3, "feature_fea_up1": -2, "feature_fea_up0": -1}
    for key, level in recorded.items():
        assert relative_error(features[level], vectors.tensor(key)) < VALUE[dtype]


@slow_but_for_few
@exhaustive_at_full_depth
@every_dtype
@pytest.mark.parametrize("name", [*SMALL, FULL], scope="module")
def test_encoder_as_generator(name, dtype):
    vectors, model = case(name), loaded(name, dtype)
    _, lr, _ = vectors.batch("eval", dtype)
    with torch.no_grad():
        assert relative_error(model.encoder(lr), vectors.tensor("rrdb_out")) < VALUE[dtype]


@slow_but_for_few
@every_case
def test_state_dict_there_and_back(name):
    vectors, weights, state = case(name), published(name), loaded(name, torch.float64).published_state_dict()
    assert list(state) == list(vectors.meta["shapes"])
    for key, value in state.items():
        assert list(value.shape) == vectors.meta["shapes"][key]
        assert torch.equal(value, weights[key]), key


@pytest.mark.slow
def test_unused_tensors_are_those_without_a_gradient():
    """152 tensors of the ×4 model: the noise couplings of level 1, the encoder's HR end, and `f`."""
    vectors = case(FULL)
    with torch.device("meta"):
        model = NCSR(vectors.config)
    frozen = {f"RRDB.{name}.{leaf}" for name in ("upconv2", "HRconv", "conv_last") for leaf in ("weight", "bias")}
    assert frozen | unused_names(model) == set(vectors.meta["shapes"]) - set(vectors.meta["grad_names"])
