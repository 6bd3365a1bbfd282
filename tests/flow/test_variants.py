"""A flow that nobody wrote code for: other branches in another order, other levels, and an encoder of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import image
from torch import nn
from variants import BRANCHES, FLOW, NOISY, Encoder, OwnNetworks, model_of

from ncsr_fast import NCSR
from ncsr_fast.config import Branch, FlowConfig, LevelConfig
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.flow.networks import NETWORKS, StackedNetworks


def images(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hr, lr and noise."""
    return image(batch, 3, 8, 12, seed=1), image(batch, 3, 4, 6, seed=2), 0.1 * image(batch, 3, 8, 12, seed=3)


def outcome(model: NCSR) -> dict[str, torch.Tensor]:
    """Values and gradients of both directions."""
    hr, lr, noise = images()
    leaves = {"hr": hr.requires_grad_(), "lr": lr.requires_grad_(), "noise": noise.requires_grad_()}
    leaves |= dict(model.named_parameters())
    latents = [latent.detach() for latent in model.encode(hr, lr, noise).latents]
    leaves |= {f"latent {index}": latent.requires_grad_() for index, latent in enumerate(latents)}
    found = {}
    for name, call in {"nll": lambda: model.nll(hr, lr, noise), "decode": lambda: model.decode(latents, lr, noise)}.items():
        value = call()
        gradients = torch.autograd.grad(value.sin().sum(), leaves.values(), allow_unused=True)
        found |= {name: value.detach()} | {f"{name}, {leaf}": g for leaf, g in zip(leaves, gradients) if g is not None}
    with torch.no_grad():
        found["sample"] = model.sample(lr, n=2, temperature=0.5, generator=torch.Generator().manual_seed(0))
        found["decode without gradients"] = model.decode(latents, lr, noise)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-11 * value.abs().max().clamp_min(1e-300), name


def test_the_engine_against_autograd_on_the_definition():
    expected = outcome(model_of(engine="plain"))
    assert {"decode, levels.1.noisy.conv1", "nll, levels.0.plain.conv3", "nll, encoder.second.weight"} <= expected.keys()
    assert_same(outcome(model_of()), expected)
    assert_same(outcome(model_of(checkpoint=False)), expected)


def test_decode_inverts_encode():
    model, (hr, lr, noise) = model_of(), images()
    latents = model.encode(hr, lr, noise).latents
    assert [tuple(latent.shape[1:]) for latent in latents] == model.latent_shapes(4, 6) == [(6, 4, 6), (24, 2, 3)]
    assert (model.decode(latents, lr, noise) - hr).abs().max() < 1e-11


def test_log_likelihood_has_the_determinant_of_the_jacobian_and_the_mean_of_the_prior():
    model, (hr, lr, noise) = model_of(), images(1)

    def flat_latents(flat: torch.Tensor) -> torch.Tensor:
        return torch.cat([latent.flatten() for latent in model.encode(flat.view(hr.shape), lr, noise).latents])

    jacobian = torch.autograd.functional.jacobian(flat_latents, hr.flatten(), vectorize=True)
    encoded = model.encode(hr, lr, noise)
    mean = model.encoder.condition(lr, None).prior_mean
    assert torch.allclose(encoded.prior_mean, mean, rtol=0, atol=1e-14)
    whitened = torch.cat([encoded.latents[0].flatten(), (encoded.latents[1] - mean).flatten()])
    density = (-0.5 * whitened.square() - 0.5 * math.log(2 * math.pi)).sum()
    assert encoded.log_likelihood.item() == pytest.approx((density + torch.linalg.slogdet(jacobian)[1]).item(), abs=1e-8)


def test_samples_are_images():
    """Residuals of the LR image enlarged, whose top latent has the mean of the prior."""
    model, (_, lr, _) = model_of(), images()
    with torch.no_grad():
        found = model.sample(lr, n=1, temperature=0.0)[:, 0]
        latents = [torch.zeros(2, *shape, dtype=lr.dtype) for shape in model.latent_shapes(4, 6)]
        latents[1] += model.encoder.condition(lr, None).prior_mean
        base = nn.functional.interpolate(lr, scale_factor=2, mode="bicubic", align_corners=False)
        assert torch.allclose(found, (base + model.decode(latents, lr)).clamp(0, 1), rtol=0, atol=1e-12)


def test_a_kind_of_networks_without_kernels_runs_by_its_definition_and_the_other_level_does_not(monkeypatch):
    monkeypatch.setitem(NETWORKS, "own", lambda *sizes: OwnNetworks(StackedNetworks(*sizes)))
    expected = outcome(model_of())
    own = replace(FLOW.levels[0], branches=(replace(BRANCHES[0], network="own"), *BRANCHES[1:]))
    model = model_of(replace(FLOW, levels=(own, FLOW.levels[1])))
    assert [level.has_kernels for level in model.levels] == [False, True]
    found = {name.replace("plain.networks.", "plain."): value for name, value in outcome(model).items()}
    assert_same(found, expected)


def test_states_are_watched_at_every_step_whatever_evaluates_a_level(monkeypatch):
    monkeypatch.setitem(NETWORKS, "own", lambda *sizes: OwnNetworks(StackedNetworks(*sizes)))

    def with_own(index: int) -> FlowConfig:
        branches = tuple(replace(branch, network="own") for branch in FLOW.levels[index].branches)
        changed = replace(FLOW.levels[index], branches=branches)
        return replace(FLOW, levels=tuple(changed if i == index else level for i, level in enumerate(FLOW.levels)))

    models = [model_of(), model_of(), model_of(with_own(0)), model_of(with_own(1))]
    models[1].engine = "plain"
    found = []
    for model in models:
        _, lr, _ = images()
        latents = [torch.ones(len(lr), *shape, dtype=lr.dtype) for shape in model.latent_shapes(*lr.shape[2:])]
        found.append(Peaks())
        with torch.no_grad():
            model.conditioned_levels(model.padded(lr)).decode(latents, None, found[-1])
    for peaks in found:
        assert len(peaks) == sum(level.steps for level in FLOW.levels)
        assert torch.allclose(torch.stack(peaks), torch.stack(found[0]), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: Branch("b", "image"), "branch b: condition must be one of"),
        (lambda: Branch("b", None, changes_all=True), "its network would read nothing"),
        (lambda: Branch("a b"), "a branch's name must be an identifier"),
        (lambda: NCSR(replace(FLOW, noise_channels=0), Encoder()), "noise_channels is 0"),
        (lambda: NCSR(FLOW), "a model of a FlowConfig needs an encoder"),
        (lambda: replace(FLOW, scale=1), "the levels squeeze by 4, but sides of HR are multiples of .* = 2"),
        (lambda: replace(FLOW, prior="uniform"), "prior must be one of"),
        (lambda: replace(FLOW, levels=(replace(FLOW.levels[0], split_channels=12),) * 2), "needs no split"),
        (lambda: LevelConfig(0, 5), "steps of a level must be an integer ≥ 1"),
        (lambda: LevelConfig(1, 5, (NOISY, NOISY)), "need names of their own"),
        (lambda: NCSR(replace(FLOW, levels=(LevelConfig(1, 5, (Branch("cache"),), squeeze=2),)), Encoder()), "'cache'"),
        (lambda: NCSR(replace(FLOW, levels=(LevelConfig(1, 5, (Branch("b", network="x"),)),)), Encoder()), "kind 'x'"),
        (lambda: model_of().save_pretrained("nowhere"), "is for the architectures of NCSRConfig"),
    ],
)
def test_bad_flows(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_a_condition_is_reused():
    """Samples, images and likelihoods are those of the model; gradients of what was recorded when it was made."""
    model, (hr, lr, noise) = model_of(), images()
    with torch.no_grad():
        flow = model.condition(lr)
    latents = [latent.detach().requires_grad_() for latent in model.encode(hr, lr, noise).latents]
    for _ in range(2):
        assert torch.allclose(flow.decode(latents, noise), model.decode(latents, lr, noise), rtol=0, atol=1e-12)
        assert torch.allclose(flow.log_prob(hr, noise), model.encode(hr, lr, noise).log_likelihood, rtol=1e-12)
    expected = torch.autograd.grad(model.decode(latents, lr, noise).sin().sum(), latents)
    for found, right in zip(torch.autograd.grad(flow.decode(latents, noise).sin().sum(), latents), expected):
        assert (found - right).abs().max() <= 1e-11 * right.abs().max()
    draw = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(flow.sample(3, 0.5, draw[0]).detach(), model.sample(lr, 3, 0.5, draw[1]).detach())
    given = [torch.zeros(2, 2, *shape, dtype=lr.dtype) for shape in model.latent_shapes(4, 6)]
    assert flow.sample(2, latents=given).shape == (2, 2, 3, 8, 12)
    with pytest.raises(ValueError, match=r"latents\[0\] must have shape \(2, 3, 6, 4, 6\), not \(2, 2"):
        flow.sample(3, latents=given)
    with torch.no_grad():
        model.levels[0].invconv.mul_(1.1)
    with pytest.raises(RuntimeError, match="call it again"):
        flow.decode(latents, noise)


def test_a_condition_is_differentiable():
    model, (_, lr, _) = model_of(), images()
    lr.requires_grad_()
    latents = [torch.zeros(2, *shape, dtype=lr.dtype) for shape in model.latent_shapes(4, 6)]
    gradients = []
    for image_of in (lambda: model.condition(lr).decode(latents), lambda: model.decode(latents, lr)):
        leaves = (lr, model.levels[1].injectors.conv1, model.encoder.first.weight)
        gradients.append(torch.autograd.grad(image_of().sin().sum(), leaves))
    for found, expected in zip(*gradients):
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_what_one_image_decides_is_shared_by_any_number_of_latents():
    model, (_, lr, _) = model_of(), images(1)
    latents = [0.3 * image(5, *shape, seed=4) for shape in model.latent_shapes(4, 6)]
    with torch.no_grad():
        flow = model.condition(lr)
        whole = flow.decode(latents)
        parts = [flow.decode([latent[index : index + 1] for latent in latents]) for index in range(5)]
    assert torch.allclose(whole, torch.cat(parts), rtol=0, atol=1e-12)
