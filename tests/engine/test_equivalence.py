"""The engine against the plain path, in float64: values, gradients of every parameter, both directions, every option."""

from __future__ import annotations

import pytest
import torch
from operator_cases import marked
from support import image, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.engine.ablation import ablated
from ncsr_fast.engine.walk import Walk

VARIANTS = {
    "noise": {"steps": 3, "noise_steps": (0, 2, 3), "transition_steps": 2},
    "std": {"noise_channels": 1, "steps": 2, "noise_steps": (0, 1, 2)},
    "all-blocks": {"noise_steps": (1, 1, 1)},
    "srflow": {"noise_channels": 0, "noise_steps": (), "steps": 2},
    "no-transitions": {"transition_steps": 0},
    "no-stacked-blocks": {"stacked_blocks": ()},
    "x8": {"scale": 8, "noise_steps": (0, 0, 1, 1)},
}
OPTIONS = {
    "fused": {},
    "stored-activations": {"checkpoint": False},
    "reference-operators": {"backend": "reference"},
    "native-operators": {"backend": "native"},
}
ABLATIONS = {"joined-features": {"subpixel": False}, "nchw": {"channels_last": False}, "direct": {"winograd": False}}
EXACT = 1e-11  # of the largest element: float64 through some dozens of maps and convolutions


def inputs(model: NCSR) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """hr, lr and noise of two images, their sides no power of two."""
    config, size = model.config, (6, 4)
    lr = image(2, 3, *size, seed=1)
    hr = image(2, 3, *(side * config.scale for side in size), seed=2)
    if not config.noise_channels:
        return hr, lr, None
    shape = (1, 1) if config.noise_channels == 1 else hr.shape[2:]
    return hr, lr, 0.1 * image(2, config.noise_channels, *shape, seed=3)


def outcome(model: NCSR, options: dict, inverse: bool) -> dict[str, torch.Tensor]:
    """nll (or decoded images) with and without gradients recorded, and the gradient of everything it depends on."""
    hr, lr, noise = inputs(model)
    model.options = type(model.options)(**options)
    leaves = {"lr": lr.requires_grad_()} | ({"noise": noise.requires_grad_()} if noise is not None else {})
    if inverse:
        latents = [image(2, *shape, seed=9) - 0.5 for shape in model.latent_shapes(*lr.shape[2:])]
        leaves |= {f"latents[{i}]": latent.requires_grad_() for i, latent in enumerate(latents)}
        arguments = (latents, lr, noise)
    else:
        leaves["hr"] = hr.requires_grad_()
        arguments = (hr, lr, noise)
    function = model.decode if inverse else model.nll
    with torch.no_grad():
        found = {"value without gradients": function(*arguments)}
    model.zero_grad()
    value = function(*arguments)
    (value.sin() * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)).sum().backward()
    leaves |= {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"value": value.detach()} | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)
        assert error < EXACT, f"{name} is off by {error:.1e}"


@marked("slow", lambda variant: variant not in ("noise", "srflow"))
@pytest.mark.parametrize("inverse", [False, True], ids=["nll", "decode"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, inverse):
    model = tiny_model(**VARIANTS[variant])
    assert_same(outcome(model, {}, inverse), outcome(model, {"engine": "plain"}, inverse))


@marked("slow", lambda options: options not in ("fused", "stored-activations"))
@pytest.mark.parametrize("inverse", [False, True], ids=["nll", "decode"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, inverse):
    model = tiny_model(**VARIANTS["noise"])
    assert_same(outcome(model, OPTIONS[options], inverse), outcome(model, {"engine": "plain"}, inverse))


@pytest.mark.slow
@pytest.mark.parametrize("inverse", [False, True], ids=["nll", "decode"])
@pytest.mark.parametrize("switches", ABLATIONS)
def test_ablations(switches, inverse):
    model = tiny_model(**VARIANTS["noise"])
    with ablated(**ABLATIONS[switches]):
        found = outcome(model, {}, inverse)
    assert_same(found, outcome(model, {"engine": "plain"}, inverse))


def test_frozen_parts_get_no_gradient():
    """A frozen encoder, and a frozen flow: the others' gradients are as without freezing."""
    for frozen in ("encoder", "levels"):
        model = tiny_model(**VARIANTS["noise"])
        whole = outcome(model, {}, inverse=False)
        model.zero_grad()
        getattr(model, frozen).requires_grad_(False)
        part = outcome(model, {}, inverse=False)
        assert {name for name in whole if name not in part} == {
            name for name in whole if name.startswith(f"gradient of {frozen}.")
        }
        assert_same(part, {name: whole[name] for name in part})


def test_a_pass_without_gradients_saves_no_layers(monkeypatch):
    """Neither of images nor of weights: hidden layers of all steps would be as much memory as training takes."""
    model = tiny_model(**VARIANTS["noise"])
    model.checkpoint = False
    hr, lr, noise = inputs(model)
    expected = model.nll(hr, lr, noise)
    monkeypatch.setattr(Walk, "layers", lambda *arguments: pytest.fail("layers are saved"))
    with torch.no_grad():
        assert torch.equal(model.nll(hr, lr, noise), expected)


def test_gradients_of_gradients():
    """A gradient penalty: through the plain path of every piece, and equal to it."""
    penalties = []
    for engine in ("fused", "plain"):
        model = tiny_model(**VARIANTS["noise"])
        model.engine = engine
        hr, lr, noise = inputs(model)
        hr.requires_grad_()
        (gradient,) = torch.autograd.grad(model.nll(hr, lr, noise).sum(), hr, create_graph=True)
        gradient.square().sum().backward()
        penalties.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for fused, plain in zip(*penalties, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


# float32 enters what holds the flags; float64 shows a formula that differs by less than float32's rounding
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.exhaustive)], ids=str)
def test_compiled_in_one_graph(dtype):
    """Likelihoods, gradients and images of both directions, and no break in either graph."""
    value, gradient = (1e-5, 1e-4) if dtype == torch.float32 else (1e-12, 1e-9)
    model = tiny_model(dtype=dtype, blocks=1, stacked_blocks=(0,), steps=2, noise_steps=(0, 1, 2))
    hr, lr, noise = (tensor.to(dtype) for tensor in inputs(model))
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(hr, lr, noise)
    expected = model(hr, lr, noise)
    assert torch.allclose(found, expected, rtol=value)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(nll.mean(), parameters) for nll in (found, expected)), strict=True):
        assert (ours - theirs).abs().max() <= gradient * theirs.abs().max()
    with torch.no_grad():
        latents = [image(2, *shape, dtype=dtype) for shape in model.latent_shapes(*lr.shape[2:])]
        decoded = torch.compile(model.decode, backend="aot_eager", fullgraph=True)(latents, lr)
        assert torch.allclose(decoded, model.decode(latents, lr), rtol=value, atol=gradient)
