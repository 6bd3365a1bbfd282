"""Precision of the networks under `torch.autocast`: values and gradients of that option, wherever `backward` is called."""

from __future__ import annotations

import contextlib

import pytest
import torch
from compat.networks import SMALL, accelerated_twins
from operator_cases import arguments, differentiable, directions, marked, operators, run
from support import image, relative_error, tiny_model

import ncsr_fast
from ncsr_fast import NCSR
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.graphs import Sampler, TrainingStep
from ncsr_fast.metrics.imresize import imresize

F32 = torch.float32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDED = {"bf16": 3e-2, "fp16": 4e-3}  # four halves of an eps of the networks, beside the largest element
precisions = pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
checkpoints = pytest.mark.parametrize("checkpoint", [True, False], ids=["recomputed", "stored"])


def autocast(precision: str, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=DTYPES[precision], enabled=enabled)


def model_of(precision: str = "fp32", dtype: torch.dtype = F32, **options) -> NCSR:
    model = tiny_model(dtype=dtype, steps=2, noise_steps=(0, 1, 2), transition_steps=2)
    model.options = type(model.options)(precision=precision, **options)
    return model


def images(dtype: torch.dtype = F32) -> list[torch.Tensor]:
    shapes = (2, 3, 24, 16), (2, 3, 6, 4), (2, 3, 24, 16)
    return [image(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def step(model: NCSR, forward: contextlib.AbstractContextManager, backward: contextlib.AbstractContextManager, scale=1.0):
    """The loss, and the gradients over `scale`."""
    model.zero_grad()
    with forward:
        loss = model.nll(*images(model.levels[0].actnorm_bias.dtype)).mean()
    assert loss.dtype == model.levels[0].actnorm_bias.dtype
    with backward:
        (loss * scale).backward()
    gradients = {name: parameter.grad / scale for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(gradient.dtype == model.levels[0].actnorm_bias.dtype for gradient in gradients.values())
    return {"loss": loss.detach()} | gradients


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


nothing = contextlib.nullcontext


@marked("slow", lambda inside: inside)
@precisions
@checkpoints
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_training_steps(precision, checkpoint, inside):
    model = model_of(checkpoint=checkpoint)
    found = step(model, autocast(precision), autocast(precision) if inside else nothing())
    assert_equal(found, step(model_of(precision, checkpoint=checkpoint), nothing(), nothing()))
    exact = step(model_of(checkpoint=checkpoint), nothing(), nothing())
    assert not torch.equal(found["loss"], exact["loss"])
    assert relative_error(found["loss"], exact["loss"]) < ROUNDED[precision]


@checkpoints
def test_a_backward_pass_under_another_autocast(checkpoint):
    """What is recomputed is computed as in the forward pass."""
    model = model_of(checkpoint=checkpoint)
    expected = step(model, nothing(), nothing())
    for precision in DTYPES:
        assert_equal(step(model, nothing(), autocast(precision)), expected)


@pytest.mark.slow
def test_scaled_gradients_and_disabled_regions():
    scaled = step(model_of(), autocast("fp16"), nothing(), scale=2.0**12)
    exact = step(model_of(), nothing(), nothing())
    for name, value in exact.items():
        assert relative_error(scaled[name], value) < 0.1, name
    model = model_of()
    with autocast("bf16"):
        found = step(model, autocast("bf16", enabled=False), nothing())
    assert_equal(found, exact)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with autocast("fp16"):
        loss = model.nll(*images()).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    scaler.step(optimizer)


@precisions
def test_float64_models_are_not_touched(precision):
    model = model_of(dtype=torch.float64)
    expected = step(model, nothing(), nothing())
    assert_equal(step(model, autocast(precision), autocast(precision)), expected)
    model.engine = "plain"
    found = step(model, autocast(precision), nothing())
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-10, name


@pytest.mark.slow
@precisions
def test_every_call(precision):
    lr, hr = images()[1], images()[0]
    model, wanted = model_of(), model_of(precision)
    latents = [image(2, *shape, dtype=F32) - 0.5 for shape in model.latent_shapes(6, 4)]

    def results(one: NCSR) -> list[torch.Tensor]:
        sampled = one.sample(lr, n=2, generator=torch.Generator().manual_seed(0))
        drawn = Sampler(one, 2, graph=False)(lr, 0.9, torch.Generator().manual_seed(0))[0]
        return [*one.encode(hr, lr).latents, one.nll(hr, lr), one.decode(latents, lr), sampled, drawn]

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with autocast(precision):
                found = results(model)
            assert all(torch.equal(*pair) for pair in zip(found, results(wanted), strict=True))
    frozen = model_of().freeze_for_inference()
    exact = frozen.nll(hr, lr)
    with autocast(precision):
        assert torch.equal(frozen.nll(hr, lr), wanted.nll(hr, lr))
    assert torch.equal(frozen.nll(hr, lr), exact)
    initialized, other = model_of(), model_of()
    with autocast(precision):
        initialized.initialize(hr, lr)
    other.initialize(hr, lr)
    assert all(torch.equal(*pair) for pair in zip(initialized.parameters(), other.parameters()))


@precisions
def test_the_plain_engine(precision):
    """Autocast's own convolutions; the state is float32."""
    model = model_of(engine="plain")
    found = step(model, autocast(precision), nothing())
    exact = step(model, nothing(), nothing())
    assert not torch.equal(found["loss"], exact["loss"])
    assert relative_error(found["loss"], exact["loss"]) < ROUNDED[precision]
    with autocast(precision):
        encoded = model.encode(*images())
    assert {latent.dtype for latent in encoded.latents} == {F32}


@operators
@directions
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_operators_are_not_touched(name, inverse, backend):
    tensors = differentiable(arguments(name, dtype=F32))

    def outcome(first, second) -> list[torch.Tensor]:
        with first:
            y, logdet = run(name, *tensors, inverse=inverse, backend=backend)
        with second if backend == "auto" else nothing():  # the reference's gradient is PyTorch's own
            return [y, logdet, *torch.autograd.grad(y.sin().sum() + logdet.sum(), tensors)]

    pairs = zip(outcome(autocast("bf16"), autocast("bf16")), outcome(nothing(), nothing()), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@precisions
@pytest.mark.parametrize("plain", [False, True], ids=["engine", "plain"])
def test_the_generator(precision, plain):
    """It returns what a network of convolutions returns under autocast: the dtype asked for, as from an image of that dtype."""
    torch.manual_seed(0)
    generator, lr = RRDB(channels=12, growth=12, blocks=2), images()[1]
    method = {"method": None} if plain else {}
    found = []
    for image_of, region in ((lr, autocast(precision)), (lr.to(DTYPES[precision]), nothing())):
        generator.zero_grad()
        with region:
            sr = generator(image_of, **method)
        sr.float().sin().sum().backward()
        found.append([sr.detach(), *(parameter.grad for parameter in generator.parameters())])
    assert found[0][0].dtype == DTYPES[precision] and {gradient.dtype for gradient in found[0][1:]} == {F32}
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert relative_error(found[0][0], generator(lr).detach()) < ROUNDED[precision]
    block, features = generator.body[0], image(2, 12, 6, 4, dtype=F32)  # of float32 features, as after another layer
    with autocast(precision):
        rounded = block(features, **method).detach()
    exact = block(features).detach()
    assert not torch.equal(rounded, exact) and relative_error(rounded, exact) < ROUNDED[precision]


@pytest.mark.slow
@precisions
def test_accelerated_networks(precision):
    """Served at the precision asked for, and not by their own code, which would round the state."""
    net, other, report = accelerated_twins(SMALL, F32, step=0.003)
    inputs = SMALL.images(F32)
    ncsr_fast.accelerate(other, precision=precision)
    with autocast(precision):
        likelihood = net(**inputs)[1]
        with torch.no_grad():
            kept = net(**inputs)[1]
    likelihood.mean().backward()
    expected = other(**inputs)[1]
    expected.mean().backward()
    assert torch.equal(likelihood, expected) and not report.handed_over
    with torch.no_grad():
        assert torch.equal(kept, other(**inputs)[1])
        assert not torch.equal(net(**inputs)[1], kept)
    for ours, theirs in zip(net.parameters(), other.parameters()):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
def test_networks_are_recognised_under_autocast():
    with autocast("bf16"):
        assert list(ncsr_fast.accelerate(SMALL.build()).replaced) == [""]


def test_captured_steps_and_the_degradation():
    model = model_of()
    step_of = TrainingStep(model, None, graph=False)
    with autocast("bf16"):
        result, _ = step_of(*images())
        assert imresize(images()[0], 0.25).dtype == F32
        small = imresize(images()[0], 0.25)
    assert torch.equal(result, model_of("bf16").nll(*images()).mean())
    assert torch.equal(small, imresize(images()[0], 0.25))
