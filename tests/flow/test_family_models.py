"""Small models of every system of the family: both engines, any size, samples, files, and what is said about wrong ones."""

from __future__ import annotations

import pytest
import torch
from operator_cases import marked
from support import assert_same_weights, image, randomize, tiny_config

from ncsr_fast import NCSR, CheckpointError, NCSRConfig
from ncsr_fast.checkpoints import published
from ncsr_fast.systems import SYSTEMS

FAMILY = [system for system in SYSTEMS if system != "ncsr"]
every_system = pytest.mark.parametrize("system", FAMILY, scope="module")
slow_but_for_three = marked("slow", lambda system: system not in ("fs-ncsr", "srflow-da-s", "llflow"))
SPLIT_INSIDE = 8  # steps of SRFlow-DA-S with two splits


def config_of(system: str, **changes) -> NCSRConfig:
    values = {"system": system, "scale": SYSTEMS[system].scales[0], "noise_channels": 0, "noise_steps": ()}
    if SYSTEMS[system].noise:
        values |= {"noise_channels": 3, "noise_steps": (0, 1, 1)}
    if SYSTEMS[system].split_period:
        values["steps"] = SPLIT_INSIDE
    return tiny_config(**values | changes)


def model_of(system: str, **options) -> NCSR:
    torch.manual_seed(0)
    # of 36 layers a smaller step keeps activations within bounds
    return randomize(NCSR(config_of(system), **options), amount=0.02).double()


def images(model: NCSR, size: tuple[int, int] = (8, 16), batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """hr and lr."""
    scale, flow = model.flow.scale, model.flow
    hr = image(batch, flow.channels, scale * size[0], scale * size[1], seed=1)
    return hr, image(batch, flow.lr_channels, *size, seed=2)


def outcome(model: NCSR) -> dict[str, torch.Tensor]:
    """Values and gradients of both directions."""
    hr, lr = images(model, (8, 8))
    leaves = {"hr": hr.requires_grad_(), "lr": lr.requires_grad_(), **dict(model.named_parameters())}
    latents = [latent.detach().requires_grad_() for latent in model.encode(hr, lr).latents]
    leaves |= {f"latent {index}": latent for index, latent in enumerate(latents)}
    found = {}
    for name, call in {"nll": lambda: model.nll(hr, lr), "decode": lambda: model.decode(latents, lr)}.items():
        value = call()
        recorded = {leaf: tensor for leaf, tensor in leaves.items() if tensor.requires_grad}
        gradients = torch.autograd.grad(value.sin().sum(), recorded.values(), allow_unused=True)
        found |= {name: value.detach()} | {f"{name}, {leaf}": g for leaf, g in zip(recorded, gradients) if g is not None}
    with torch.no_grad():
        found["sample"] = model.sample(lr, n=3, temperature=0.5, generator=torch.Generator().manual_seed(0))
        found["decode without gradients"] = model.decode(latents, lr)
    return found


@slow_but_for_three
@every_system
def test_the_engine_is_the_definition(system):
    model = model_of(system)
    assert all(level.has_kernels for level in model.levels)
    model.engine = "plain"
    expected = outcome(model)
    assert any(name.startswith("nll, levels.0.injectors") for name in expected)
    for options in ({"engine": "fused"}, {"engine": "fused", "checkpoint": False}, {"engine": "fused", "samples_at_once": 2}):
        model.options = type(model.options)(**options)
        found = outcome(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-11 * value.abs().max().clamp_min(1e-300), (name, options)


@slow_but_for_three
@every_system
@pytest.mark.parametrize("size", [(1, 1), (5, 11), (9, 16)])
def test_any_size(system, size):
    model = model_of(system)
    hr, lr = images(model, size, batch=1)
    with torch.no_grad():
        encoded = model.encode(hr, lr)
        assert [latent.shape[1:] for latent in encoded.latents] == [torch.Size(s) for s in model.latent_shapes(*size)]
        assert (model.decode(encoded.latents, lr) - hr).abs().max() < 1e-9
        assert model.sample(lr, n=2, temperature=0.5).shape == (1, 2, *hr.shape[1:])


@slow_but_for_three
@every_system
def test_samples(system):
    """Of temperature 0 the decoded mean, in [0, 1]; of any other each its own."""
    model = model_of(system)
    _, lr = images(model, (8, 8))
    with torch.no_grad():
        latents = [torch.zeros(len(lr), *shape, dtype=lr.dtype) for shape in model.latent_shapes(8, 8)]
        mean = model.features(lr).prior_mean
        assert (mean is not None) == (system == "llflow")
        latents[-1] += 0 if mean is None else mean
        cold = model.sample(lr, n=2, temperature=0)
        base = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic") if system == "fs-ncsr" else 0
        expected = (model.decode(latents, lr) + base).clamp(0, 1)
        assert (cold - expected[:, None]).abs().max() < 1e-12
        warm = model.sample(lr, n=2, temperature=0.8, generator=torch.Generator().manual_seed(0))
        assert (warm[:, 0] - warm[:, 1]).abs().max() > 1e-3 and (warm - cold).abs().max() > 1e-3
        flow = model.condition(lr)
        again = flow.sample(2, 0.8, torch.Generator().manual_seed(0))
    assert (again - warm).abs().max() < 1e-12


@slow_but_for_three
@every_system
def test_a_condition_without_gradients_gives_the_weights_none(system):
    """Those of latents alone, as when the condition is made under `torch.no_grad()`."""
    model = model_of(system)
    _, lr = images(model, (8, 8), batch=1)
    with torch.no_grad():
        flow = model.condition(lr)
    latents = [torch.zeros(1, *shape, dtype=lr.dtype, requires_grad=True) for shape in model.latent_shapes(8, 8)]
    flow.decode(latents).square().sum().backward()
    assert all(latent.grad.abs().max() > 0 for latent in latents)
    assert all(parameter.grad is None for parameter in model.parameters())


@slow_but_for_three
@every_system
def test_frozen_and_checked(system):
    model = model_of(system)
    hr, lr = images(model, (8, 8))
    with torch.no_grad():
        expected = model.nll(hr, lr)
        report = model.check_invertibility(lr, temperature=0.5)
        assert len(report.steps) == sum(level.transition_steps + level.steps for level in model.levels)
        assert report.round_trip < 1e-9 and {step.of for step in report.steps} <= {
            "actnorm",
            "injector",
            "coupling",
            "noise coupling",
        }
        model.freeze_for_inference()
        assert torch.equal(model.nll(hr, lr), expected)


@every_system
def test_a_directory_is_the_model(tmp_path, system):
    model = model_of(system)
    model.save_pretrained(tmp_path)
    found = NCSR.from_pretrained(tmp_path)
    assert found.config == model.config
    assert_same_weights(model, found)
    hr, lr = images(model, (8, 8))
    assert torch.equal(found.nll(hr, lr), model.nll(hr, lr))


@every_system
def test_a_published_state_dict_there_and_back(tmp_path, system):
    model = model_of(system)
    model.actnorm_initialized.fill_(True)
    state = model.published_state_dict()
    unused = {name for name, place in published.places(model).items() if place is None}
    assert "flowUpsamplerNet.f.0.bias" in unused
    for name in unused:
        state[name] = image(*state[name].shape)
    torch.save(state, tmp_path / "model.pth")
    found = NCSR.from_pretrained(tmp_path / "model.pth", config=model.config)
    assert_same_weights(model, found)
    back = found.published_state_dict()
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_places_of_layers_in_a_stack():
    places = published.places(model_of("srflow-da-r"))
    assert places["flowUpsamplerNet.layers.2.affine.fAffine2.4.weight"] == "levels.0.couplings.conv2[0][2]"
    used = [place for place in places.values() if place is not None]
    assert len(set(used)) == len(used)


@every_system
def test_a_state_dict_of_another_system_is_recognised(system):
    """The first tensors that differ are named, and whose they look like; nothing is loaded."""
    model, other = model_of(system), model_of("llflow" if system != "llflow" else "ctflow")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    title = "NCSR or FS-NCSR" if system == "fs-ncsr" else SYSTEMS[system].title
    with pytest.raises(CheckpointError, match=rf"does not fit this model \(.*looks like that of {title}; \d+ missing: RRDB"):
        other.load_published(model.published_state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_state_dict_of_another_size_looks_like_nothing_else():
    other = NCSR(config_of("ctflow", blocks=3))
    with pytest.raises(CheckpointError, match="this model .CTFlow, ×1, 2 blocks, 1 steps per level.; 30 unexpected"):
        model_of("ctflow").load_published(other.published_state_dict())


def test_a_state_dict_of_a_generator_is_no_flow():
    model = model_of("srflow-da")
    with pytest.raises(CheckpointError, match="looks like that of no flow; .* missing: flowUpsamplerNet.layers.1"):
        model.load_published({name: value for name, value in model.published_state_dict().items() if name.startswith("RRDB.")})


def test_the_mean_of_the_reference_is_for_flows_that_have_one():
    model = model_of("ctflow")
    hr, lr = images(model, (8, 8))
    with pytest.raises(ValueError, match="prior='reference' is for flows whose prior has a mean"):
        model.nll(hr, lr, prior="reference")
    with pytest.raises(ValueError, match="prior must be one of 'condition', 'reference', not 'lr'"):
        model.nll(hr, lr, prior="lr")
    bright = model_of("llflow")
    hr, lr = images(bright, (8, 8))
    assert (bright(hr, lr, prior="reference") - bright.nll(hr, lr)).abs().max() > 1e-3


def test_the_mean_of_the_prior_is_of_the_dtype_of_the_state():
    model = model_of("llflow", precision="bf16").float()
    hr, lr = (image.float() for image in images(model, (8, 8)))
    encoded = model.encode(hr, lr)
    assert encoded.prior_mean.dtype == encoded.latents[-1].dtype == torch.float32


def test_lr_images_have_channels_of_their_own():
    model = model_of("llflow")
    hr, lr = images(model, (8, 8))
    with pytest.raises(ValueError, match=r"lr must have shape \(B, 6, H, W\), not \(2, 3, 8, 8\)"):
        model.nll(hr, lr[:, :3])
    with pytest.raises(ValueError, match=r"hr must have shape \(2, 3, 8, 8\) for lr \(2, 6, 8, 8\) at scale 1"):
        model.nll(hr[..., :4], lr)
