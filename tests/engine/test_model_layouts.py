"""A model's values do not depend on how its parameters and inputs lie in memory, and memory formats are accepted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from compat.networks import SMALL, accelerated_twins
from compat.networks import gradients as gradients_of_published
from layouts import LAYOUTS, laid_out
from operator_cases import marked
from support import image, tiny_model

import ncsr_fast
from ncsr_fast import NCSR
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.engine.ablation import ablated

EXACT = 1e-11
layouts = pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
OPTIONS = {
    "recomputed": {},
    "stored": {"checkpoint": False},
    "nchw": {"nchw": True},  # by ablation
    "reference": {"backend": "reference"},
}


def model_of(**options) -> NCSR:
    """Wide enough for every kernel."""
    model = tiny_model(channels=12, growth=12, hidden_channels=12, steps=2, noise_steps=(0, 1, 2))
    model.options = type(model.options)(**{name: value for name, value in options.items() if name != "nchw"})
    return model


def images() -> list[torch.Tensor]:
    """hr, lr and noise."""
    return [image(2, 3, 24, 16, seed=2), image(2, 3, 6, 4, seed=1), 0.1 * image(2, 3, 24, 16, seed=3)]


def lay_out(module: torch.nn.Module, layout: str) -> None:
    for parameter in module.parameters():
        parameter.data = laid_out(parameter.data, layout)


def outcome(model: NCSR, hr, lr, noise, layout: str = "contiguous") -> dict[str, torch.Tensor]:
    """Values with and without gradients recorded, and all gradients."""
    latents = [laid_out(image(2, *shape, seed=9) - 0.5, layout) for shape in model.latent_shapes(*lr.shape[2:])]
    leaves = {"hr": hr.requires_grad_(), "lr": lr.requires_grad_(), "noise": noise.requires_grad_()}
    leaves |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {}
    for name, call in {"nll": lambda: model.nll(hr, lr, noise), "decode": lambda: model.decode(latents, lr, noise)}.items():
        with torch.no_grad():
            found[f"{name} without gradients"] = call()
        value = call()
        gradients = torch.autograd.grad(value.sin().sum(), leaves.values(), allow_unused=True)
        found |= {name: value.detach()} | {f"{name}, {leaf}": g for leaf, g in zip(leaves, gradients) if g is not None}
    model.zero_grad()
    model.nll(hr, lr, noise).sum().backward()
    found |= {f".grad of {name}": leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    with torch.no_grad():
        found["sample"] = model.sample(lr, n=2, generator=torch.Generator().manual_seed(0))
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)
        assert error < EXACT, f"{name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def expected():
    found = {}
    for name, options in OPTIONS.items():
        with ablated(channels_last="nchw" not in options):
            found[name] = outcome(model_of(**options), *images())
    return found


# every layout with the default, every option with a layout of memory alone, of views and of strides that mean nothing
FEW = ("channels_last", "sliced", "strange single")


@marked("exhaustive", lambda options, layout: options != "recomputed" and layout not in FEW)
@marked("slow", lambda options, layout: options != "recomputed" or layout not in FEW)
@pytest.mark.parametrize("options", OPTIONS)
@layouts
@pytest.mark.slow
def test_models(options, layout, expected):
    model = model_of(**OPTIONS[options])
    lay_out(model, layout)
    with ablated(channels_last=options != "nchw"):
        assert_same(outcome(model, *(laid_out(x, layout) for x in images()), layout), expected[options])


@pytest.fixture(scope="module")
def published():
    """The likelihood and the gradients of a network left alone."""
    net = SMALL.build()
    right = gradients_of_published(net, **SMALL.images())
    with torch.no_grad():
        return net(**SMALL.images())[1], right


@marked("slow", lambda layout: layout != "channels_last")
@layouts
def test_accelerated_networks(layout, published):
    net, _, _ = accelerated_twins(SMALL)
    inputs, (likelihood, right) = SMALL.images(), published
    with torch.no_grad():
        net(**inputs)  # what is kept is of the parameters as they lie now
        lay_out(net, layout)
        lying = {name: laid_out(value, layout) for name, value in inputs.items()}
        assert torch.allclose(net(**lying)[1], likelihood, rtol=1e-10)
    for name, gradient in gradients_of_published(net, **lying).items():
        if right[name] is not None:
            assert torch.allclose(gradient, right[name], rtol=1e-8, atol=1e-10 * float(right[name].abs().max())), name


def test_another_layout_of_the_same_memory_is_a_change():
    """The transpose of a square matrix has the same address, shape, count of changes and sum of bits."""
    model = model_of()
    with torch.no_grad():
        before = model.nll(*images())
        model.levels[0].invconv.data = model.levels[0].invconv.data.mT
        after = model.nll(*images())
        assert not torch.allclose(after, before)
        fresh = model_of()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(after, fresh.nll(*images()))


# -- Module.to and what else there is ------------------------------------------------------------------------------


@marked("slow", lambda memory_format: memory_format is not torch.channels_last)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format, torch.contiguous_format], ids=str)
def test_memory_formats(memory_format, expected):
    model = model_of().to(memory_format=memory_format)
    assert_same(outcome(model, *images()), expected["recomputed"])
    if memory_format is torch.channels_last:
        assert model.encoder.conv_first.weight.is_contiguous(memory_format=torch.channels_last)
        single = model.levels[0].couplings.conv3[0]
        assert single.is_contiguous(memory_format=torch.channels_last) and not single.is_contiguous()
        fresh = model_of()
        fresh.load_state_dict(model.state_dict())
        assert all(torch.equal(*pair) for pair in zip(fresh.parameters(), model.parameters()))


@pytest.mark.slow
def test_memory_formats_of_others():
    encoder, net = RRDB(channels=4, growth=2, blocks=1), SMALL.build()
    lr = image(1, 3, 4, 4, dtype=torch.float32)
    sr = encoder(lr)
    assert torch.allclose(encoder.to(memory_format=torch.channels_last)(lr), sr, atol=1e-6)
    inputs = SMALL.images()
    likelihood = net(**inputs)[1]
    ncsr_fast.accelerate(net)
    assert torch.allclose(net.to(memory_format=torch.channels_last)(**inputs)[1], likelihood)


def test_a_format_of_other_dimensions_is_refused_as_by_every_2d_network():
    model = model_of()
    with pytest.raises(RuntimeError, match="required rank 5 tensor to use channels_last_3d"):
        model.to(memory_format=torch.channels_last_3d)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.slow
def test_copies_and_moves(expected):
    model = model_of().to(memory_format=torch.channels_last)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    for moved in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(outcome(moved, *images()), expected["recomputed"])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert_same(outcome(averaged.module, *images()), expected["recomputed"])
    meta = copy.deepcopy(model).to("meta")
    value = meta.nll(*(x.to("meta") for x in images()))
    value.sum().backward()
    assert value.device.type == "meta" and meta.levels[0].invconv.grad.device.type == "meta"
    with pytest.raises(ValueError, match="on_nonfinite='ignore'"), torch.no_grad():
        meta.sample(images()[1].to("meta"), n=2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str)
def test_half_precision_models(dtype, tolerance, expected):
    """Every weight and image is rounded; the log-determinants are float32."""
    model = model_of().to(dtype)
    hr, lr, noise = (x.to(dtype) for x in images())
    value = model.nll(hr, lr, noise)
    assert value.dtype == torch.float32
    assert (value - expected["recomputed"]["nll"]).abs().max() < tolerance
    value.sum().backward()
    assert model.levels[0].invconv.grad.dtype == dtype
    assert model.sample(lr, n=1).isfinite().all()


def test_parametrizations(expected):
    """Of convolutions of the encoder and of a stack of the flow: their tensors are made anew in every call."""
    model = model_of()
    block = model.encoder.body[0].rdb1
    for conv in (model.encoder.conv_first, block.conv1, block.conv5):
        torch.nn.utils.parametrizations.weight_norm(conv)

    class Doubled(torch.nn.Module):
        def forward(self, value):
            return 2 * value

        def right_inverse(self, value):
            return value / 2

    torch.nn.utils.parametrize.register_parametrization(model.levels[0].couplings, "conv1", Doubled())
    torch.nn.utils.parametrize.register_parametrization(model.levels[1], "actnorm_bias", Doubled())
    hr, lr, noise = images()
    value = model.nll(hr, lr, noise)
    assert torch.allclose(value, expected["recomputed"]["nll"])
    value.sum().backward()
    original = model.levels[0].couplings.parametrizations.conv1.original
    assert torch.allclose(original.grad, 2 * expected["recomputed"][".grad of levels.0.couplings.conv1"])
    with torch.no_grad():
        assert torch.allclose(model.nll(hr, lr, noise), value)
        original.add_(0.1)  # what was folded is stale
        changed = model.nll(hr, lr, noise)
        model.engine = "plain"
        assert torch.allclose(model.nll(hr, lr, noise), changed) and not torch.allclose(changed, value)
