"""The model against what the published programs computed (tests/conformance/README.md)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from operator_cases import marked
from support import Case, load_case, relative_error, weights_module
from vectors import GRADIENT, VALUE, every_dtype, published_gradients, unused_names

from ncsr_fast import NCSR

SMALL = ["ncsr_x4_small", "ncsr_x4_std_small", "ncsr_x8_small", "srflow_x4_small"]
CASES = [*SMALL, "ncsr_x4_full"]
# of module scope, so that the tests of a network and dtype follow one another and share one model
every_case = pytest.mark.parametrize("name", CASES, scope="module")
small_cases = pytest.mark.parametrize("name", SMALL, scope="module")
slow_but_for_one = marked("slow", lambda name: name != SMALL[0])
# full depth in float64 and a small network in float32 fail for what these would, and so do likelihood and decoding of both
exhaustive_at_full_depth = marked("exhaustive", lambda name, dtype: name not in SMALL and dtype == torch.float32)


@functools.lru_cache(maxsize=1)
def case(name: str) -> Case:
    return load_case(name)


@functools.lru_cache(maxsize=1)
def published(name: str) -> dict[str, torch.Tensor]:
    """The published state dict of a case, actnorms from the vectors."""
    vectors, weights = case(name), case(name).weights()
    for key, value in zip(vectors.meta["actnorm_names"], vectors.tensor("actnorm").split(vectors.meta["actnorm_sizes"])):
        weights[key] = value.reshape(weights[key].shape)
    return weights


def made_of(name: str, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> NCSR:
    """The model of a case with these weights."""
    model = NCSR(case(name).config).to(dtype)
    model.load_published(weights)
    return model


@functools.lru_cache(maxsize=1)
def loaded(name: str, dtype: torch.dtype) -> NCSR:
    """The model of a case, shared: a test changes nothing of it but gradients."""
    return made_of(name, published(name), dtype)


@slow_but_for_one
@exhaustive_at_full_depth
@every_dtype
@every_case
def test_actnorm_initialisation(name, dtype):
    vectors = case(name)
    weights = published(name) | {key: torch.zeros_like(published(name)[key]) for key in vectors.meta["actnorm_names"]}
    model = made_of(name, weights, dtype)
    assert not model.actnorm_initialized
    nll = model.initialize(*vectors.batch("init", dtype))
    state = model.published_state_dict()
    actnorms = torch.cat([state[key].flatten() for key in vectors.meta["actnorm_names"]])
    assert model.actnorm_initialized
    assert relative_error(actnorms, vectors.tensor("actnorm")) < VALUE[dtype]
    assert relative_error(nll, vectors.tensor("init_nll")) < VALUE[dtype]


@slow_but_for_one
@every_dtype
@every_case
def test_likelihood_and_latents(name, dtype):
    vectors, model = case(name), loaded(name, dtype)
    with torch.no_grad():
        batch = vectors.batch("eval", dtype)
        encoded = model.encode(*batch)
        assert relative_error(model.nll(*batch), vectors.tensor("nll")) < VALUE[dtype]
    expected = vectors.latents("latent")
    assert len(encoded.latents) == len(expected)
    for latent, target in zip(encoded.latents, expected):
        assert relative_error(latent, target) < VALUE[dtype]


@slow_but_for_one
@every_case
def test_gradients(name):
    vectors, model = case(name), loaded(name, torch.float64)
    hr, lr, noise = vectors.batch("eval")
    hr.requires_grad_()
    lr.requires_grad_()
    model.zero_grad()
    model.nll(hr, lr, noise).mean().backward()
    assert relative_error(hr.grad, vectors.tensor("grad_hr")) < GRADIENT
    assert relative_error(lr.grad, vectors.tensor("grad_lr")) < GRADIENT

    gradients = published_gradients(model)
    names = vectors.meta["grad_names"]
    assert sorted(gradients) == sorted(names)
    tensor_for = weights_module().tensor_for
    dots = []
    for key in names:
        probe = torch.from_numpy(tensor_for("probe:" + key, tuple(gradients[key].shape), vectors.meta["seed"]))
        dots.append((gradients[key] * probe).sum())
    norms = torch.stack([gradients[key].norm() for key in names])
    assert ((norms - vectors.tensor("grad_norm")).abs() <= GRADIENT * vectors.tensor("grad_norm")).all()
    # a sum or dot product cancels, so its error is measured against what it could have been
    count = torch.tensor([gradients[key].numel() for key in names]).sqrt()
    sums = torch.stack([gradients[key].sum() for key in names])
    assert ((sums - vectors.tensor("grad_sum")).abs() <= GRADIENT * norms * count).all()
    assert ((torch.stack(dots) - vectors.tensor("grad_dot")).abs() <= GRADIENT * norms * count).all()


@pytest.mark.exhaustive  # test_gradients has the fused engine at this depth, tests/engine/test_equivalence.py every engine
def test_gradients_of_the_engine_at_full_depth():
    """With and without stored activations, against the plain path step by step: every parameter and both images."""
    vectors, model = case("ncsr_x4_full"), copy.deepcopy(loaded("ncsr_x4_full", torch.float64))
    hr, lr, noise = vectors.batch("eval")
    found = {}
    for name, options in {"plain": {"engine": "plain"}, "fused": {}, "stored": {"checkpoint": False}}.items():
        model.options = type(model.options)(**options)
        model.zero_grad()
        images = [image.clone().requires_grad_() for image in (hr, lr)]
        model.nll(*images, noise).mean().backward()
        found[name] = [image.grad for image in images] + [p.grad for p in model.parameters() if p.grad is not None]
    for name in ("fused", "stored"):
        for gradient, expected in zip(found[name], found["plain"], strict=True):
            assert relative_error(gradient, expected) < 1e-6


@slow_but_for_one
@every_dtype
@every_case
def test_decoding(name, dtype):
    vectors, model = case(name), loaded(name, dtype)
    lr = vectors.tensor("eval_lr", dtype)
    latents = vectors.latents("sample_latent", dtype)
    with torch.no_grad():
        assert relative_error(model.decode(latents, lr), vectors.tensor("sample")) < VALUE[dtype]
        _, logdet = model.conditioned_levels(lr).decode(latents, None)
    assert relative_error(logdet, vectors.tensor("sample_logdet")) < VALUE[dtype]


@slow_but_for_one
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


@slow_but_for_one
@exhaustive_at_full_depth
@every_dtype
@every_case
def test_encoder_as_generator(name, dtype):
    vectors, model = case(name), loaded(name, dtype)
    _, lr, _ = vectors.batch("eval", dtype)
    with torch.no_grad():
        assert relative_error(model.encoder(lr), vectors.tensor("rrdb_out")) < VALUE[dtype]


@slow_but_for_one
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
    vectors = case("ncsr_x4_full")
    with torch.device("meta"):
        model = NCSR(vectors.config)
    frozen = {f"RRDB.{name}.{leaf}" for name in ("upconv2", "HRconv", "conv_last") for leaf in ("weight", "bias")}
    assert frozen | unused_names(model) == set(vectors.meta["shapes"]) - set(vectors.meta["grad_names"])
