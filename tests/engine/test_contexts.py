"""The contexts that PyTorch documents for modules: values and gradients are those outside of them, or a refusal says so."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from operator_cases import arguments, marked
from support import image, tiny_config, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import checkpoint as recomputing

from ncsr_fast import NCSR, ops

SHAPES = (2, 3, 16, 16), (2, 3, 4, 4), (2, 3, 16, 16)
HR, LR, NOISE = (image(*shape, seed=seed) for seed, shape in enumerate(SHAPES))


def model_of(seed: int = 0, engine: str = "fused", checkpoint: bool = True) -> NCSR:
    model = tiny_model(seed, steps=2, noise_steps=(0, 1, 2), transition_steps=2)
    model.options = type(model.options)(engine=engine, checkpoint=checkpoint)
    return model


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["recomputed", "stored"])
def model(request) -> NCSR:
    return model_of(checkpoint=request.param)


class Likelihood(nn.Module):
    def __init__(self, model: NCSR) -> None:
        super().__init__()
        self.model = model

    def forward(self, *images: Tensor) -> Tensor:
        return self.model.nll(*images)


class Images(Likelihood):
    def forward(self, *latents: Tensor) -> Tensor:
        return self.model.decode(latents, LR, NOISE)


def latents(model: NCSR) -> list[Tensor]:
    return [image(2, *shape, seed=9) - 0.5 for shape in model.latent_shapes(4, 4)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)
        assert error < tolerance, f"{name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    """The likelihood and its gradients by the plain engine, outside of every context."""
    plain = model_of(engine="plain")
    value = plain.nll(HR, LR, NOISE)
    value.mean().backward()
    return {"value": value.detach(), **gradients(plain)}


def outcome(model: NCSR, call=None) -> dict[str, Tensor]:
    model.zero_grad()
    value = (call or model.nll)(HR, LR, NOISE)
    value.mean().backward()
    return {"value": value.detach(), **gradients(model)}


def gradient_of_hr() -> Tensor:
    """(B, 3, H, W) of each image's own likelihood."""
    hr = HR.clone().requires_grad_()
    return torch.autograd.grad(model_of(engine="plain").nll(hr, LR, NOISE).sum(), hr)[0]


# -- recording, saving and recomputing -----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(model, right, reentrant):
    start = torch.zeros((), requires_grad=True)  # what the reentrant one needs to record anything

    def call(*images: Tensor) -> Tensor:
        return recomputing.checkpoint(lambda _, *given: model.nll(*given), start, *images, use_reentrant=reentrant)

    assert_same(outcome(model, call), right)


HOOKS = {
    "save_on_cpu": save_on_cpu,
    "another layout": lambda: saved_tensors_hooks(lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x),
    "another type": lambda: saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy),
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_saved_tensors_hooks(model, right, hooks):
    def call(*images: Tensor) -> Tensor:
        with HOOKS[hooks]():
            return model.nll(*images)

    assert_same(outcome(model, call), right)


def test_gradients_twice_and_in_parts(model, right):
    value = model.nll(HR, LR, NOISE).mean()
    value.backward(retain_graph=True)
    value.backward()
    for i in range(2):
        model.nll(HR[i : i + 1], LR[i : i + 1], NOISE[i : i + 1]).sum().backward()
    found = {name: gradient / 4 for name, gradient in gradients(model).items()}
    assert_same({"value": right["value"], **found}, right)
    for name in ("levels.0.invconv", "levels.1.couplings.conv1", "levels.2.injectors.norm1_logs", "encoder.conv_first.weight"):
        parameter = model.get_parameter(name)
        assert_same({name: torch.autograd.grad(model.nll(HR, LR, NOISE).mean(), parameter)[0]}, {name: right[name]})


def test_batched_gradients(model):
    hr = HR.clone().requires_grad_()
    inputs = [hr, model.levels[0].invconv, model.levels[1].couplings.conv1, model.encoder.conv_first.weight]
    seeds = torch.eye(2, dtype=HR.dtype)
    batched = torch.autograd.grad(model.nll(hr, LR, NOISE), inputs, seeds, is_grads_batched=True)
    single = [torch.autograd.grad(model.nll(hr, LR, NOISE), inputs, seed) for seed in seeds]
    for found, *expected in zip(batched, *single):
        assert_same({"gradient": found}, {"gradient": torch.stack(expected)})


def test_backward_in_another_thread(model, right):
    def call(*images: Tensor) -> Tensor:
        value = model.nll(*images)
        thread = threading.Thread(target=value.mean().backward)
        thread.start()
        thread.join()
        return value.detach().requires_grad_()

    assert_same(outcome(model, call), right)


def test_weights_changed_between_forward_and_backward(model):
    """PyTorch's count of changes tells."""
    encoder, level = "encoder.body.0.rdb1.conv1.weight", "levels.0"
    for name in (f"{level}.invconv", "levels.1.couplings.conv1", f"{level}.injectors.conv2", encoder):
        value = model.nll(HR, LR, NOISE).mean()
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_backward_hooks(model, right):
    seen = []
    for module in (model.encoder, *model.levels, model.levels[0].couplings):
        module.register_full_backward_hook(lambda *_: None)
    wrapped = Likelihood(model)
    wrapped.register_full_backward_hook(lambda _, of_inputs, of_outputs: seen.append(of_outputs[0].clone()))
    assert_same(outcome(model, lambda hr, *rest: wrapped(hr.clone().requires_grad_(), *rest)), right)
    assert len(seen) == 1


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": deterministic,
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float16),
}


@marked("slow", lambda surrounding: surrounding in ("anomaly mode", "default dtype"))
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_surroundings(model, right, surrounding):
    reference = model_of()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sampled, decoded = reference.sample(LR, n=2, generator=generator), reference.decode(latents(reference), LR, NOISE)
    with SURROUNDINGS[surrounding]():
        assert_same(outcome(model), right)
        with torch.no_grad():
            assert torch.equal(model.sample(LR, n=2, generator=generator.manual_seed(0)), sampled)
            assert_same({"nll": model.nll(HR, LR, NOISE)}, {"nll": right["value"]})
            given = [latent.cpu() for latent in latents(model)] if surrounding != "default device" else None
            assert given is None or torch.equal(model.decode(given, LR, NOISE), decoded)


def test_inference_mode(model, right):
    """What was made inside is not used outside, where gradients are recorded."""
    with torch.inference_mode():
        inside = model.nll(HR, LR, NOISE)
        model.sample(LR, n=2)
        lr = LR.clone()
    assert_same({"value": inside.clone()}, {"value": right["value"]})
    with torch.no_grad():
        assert_same({"value": model.nll(HR, lr, NOISE)}, {"value": right["value"]})
    assert_same(outcome(model), right)
    assert_same(outcome(model, lambda hr, _, noise: model.nll(hr, lr.clone(), noise)), right)


# -- transforms ----------------------------------------------------------------------------------------------------


def test_functional_call_and_its_gradient(model, right):
    wrapped = Likelihood(model)
    parameters = {name: parameter.detach() for name, parameter in wrapped.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(wrapped, values, (HR, LR, NOISE)).mean()

    found = torch.func.grad(loss)(parameters)
    expected = {name: gradient for name, gradient in right.items() if name != "value"}
    assert_same({name: found[f"model.{name}"] for name in expected}, expected)
    other = {f"model.{name}": value for name, value in model_of(seed=1).named_parameters()}
    with torch.no_grad():
        before, changed = loss(parameters), loss(other)
        assert_same({"loss": changed}, {"loss": model_of(seed=1).nll(HR, LR, NOISE).mean()})
        assert torch.equal(before, model.nll(HR, LR, NOISE).mean())
        found = torch.func.functional_call(Images(model), other, tuple(latents(model)))
        assert_same({"image": found}, {"image": model_of(seed=1).decode(latents(model), LR, NOISE)})


@marked("slow", lambda recorded: not recorded)
@pytest.mark.parametrize("recorded", [True, False])
def test_ensembles(model, recorded):
    """Models stacked, and one call for all of them, of both directions."""
    models = [copy.deepcopy(model), model_of(seed=1, checkpoint=model.checkpoint)]
    inputs = {Likelihood: (HR, LR, NOISE), Images: tuple(latents(model))}
    for kind, given in inputs.items():
        members = [kind(member) for member in models]
        stacked = torch.func.stack_module_state(members)
        with torch.set_grad_enabled(recorded):
            call = torch.func.vmap(lambda p, b: torch.func.functional_call(members[0], (p, b), given))
            found, expected = call(*stacked), torch.stack([member(*given) for member in members])
        assert_same({"value": found.detach()}, {"value": expected.detach()})
        if recorded:
            found.sin().sum().backward()
            expected.sin().sum().backward()
            for i, member in enumerate(members):
                assert_same({n: stacked[0][n].grad[i] for n in gradients(member)}, gradients(member), 1e-8)
                member.zero_grad()


def test_inverses_of_a_batch_of_weights():
    _, bias, logs, weight = arguments("actnorm_invconv", 4)
    stacked = [torch.stack([tensor, 1.1 * tensor]) for tensor in (bias, logs, weight)]
    z = image(2, 4, 2, 3, seed=4)
    found = torch.func.vmap(lambda *parameters: ops.actnorm_invconv(z, *parameters, inverse=True)[0])(*stacked)
    expected = torch.stack([ops.actnorm_invconv(z, *parameters, inverse=True)[0] for parameters in zip(*stacked)])
    assert_same({"z": found}, {"z": expected})


def test_vmap_over_images(model):
    call = torch.func.vmap(lambda hr, lr: model.nll(hr[None], lr[None])[0])
    assert_same({"value": call(HR, LR).detach()}, {"value": model.nll(HR, LR).detach()})
    with torch.no_grad():
        assert_same({"value": call(HR, LR)}, {"value": model.nll(HR, LR)})
        sampled = torch.func.vmap(lambda lr: model.sample(lr[None], n=2, on_nonfinite="ignore"), randomness="different")(LR)
        assert sampled.shape == (2, 1, 2, 3, 16, 16)
        with pytest.raises(ValueError, match="on_nonfinite='warn' reads values, .* use on_nonfinite='ignore'"):
            torch.func.vmap(lambda lr: model.sample(lr[None], n=2), randomness="different")(LR)


@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode(model, recorded):
    tangent = image(*HR.shape, seed=5) - 0.5
    expected = {"tangent": (gradient_of_hr() * tangent).sum(dim=(1, 2, 3))}
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        value = model.nll(forward_ad.make_dual(HR, tangent), LR, NOISE)
        assert_same({"tangent": forward_ad.unpack_dual(value).tangent.detach()}, expected)
    found = torch.func.jvp(lambda hr: model.nll(hr, LR, NOISE), (HR,), (tangent,))[1]
    assert_same({"tangent": found.detach()}, expected)


@marked("slow", lambda options: bool(options))
@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}], ids=str)
def test_jacobians(model, options):
    plain = model_of(engine="plain")
    found = torch.autograd.functional.jacobian(lambda lr: model.nll(HR, lr, NOISE), LR, **options)
    expected = torch.autograd.functional.jacobian(lambda lr: plain.nll(HR, lr, NOISE), LR)
    assert_same({"jacobian": found}, {"jacobian": expected})


def test_second_derivatives(model):
    direction = image(*HR.shape, seed=5) - 0.5
    found, expected = (
        torch.autograd.functional.hvp(lambda hr: one.nll(hr, LR, NOISE).sum(), HR, direction)[1]
        for one in (model, model_of(engine="plain"))
    )
    assert_same({"product": found}, {"product": expected}, 1e-8)


# -- tracing, and tensors of other kinds ---------------------------------------------------------------------------


TRACED = [("recomputed", True), ("recomputed", False), ("stored", True)]  # without gradients nothing is stored


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace, about sizes and itself
@pytest.mark.parametrize("activations, recorded", TRACED)
def test_traced_graphs_compute(activations, recorded):
    """Kernels would write where no graph sees it."""
    model = tiny_model(blocks=1, stacked_blocks=(0,), steps=2, noise_steps=(0, 1, 2))
    model.checkpoint = activations == "recomputed"
    other = image(*HR.shape, seed=8)
    with torch.set_grad_enabled(recorded):
        expected = {"value": model.nll(other, LR, NOISE).detach()}
        graph = make_fx(lambda *images: model.nll(*images))(HR, LR, NOISE)
        assert_same({"value": graph(other, LR, NOISE).detach()}, expected)
        graph = torch.jit.trace(Likelihood(model), (HR, LR, NOISE), check_trace=False)
        # sizes are tensors there, and their product with a number, of bits in a nat, is float32
        assert_same({"value": graph(other, LR, NOISE).detach()}, expected, torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_fake_tensors(model):
    with FakeTensorMode() as mode:
        fake = NCSR(tiny_config(blocks=1, stacked_blocks=(0,)))
        fake.options = model.options
        hr, lr, noise = (mode.from_tensor(value).float() for value in (HR, LR, NOISE))
        value = fake.nll(hr, lr, noise)
        value.mean().backward()
        assert value.shape == (2,) and fake.levels[0].invconv.grad.shape == fake.levels[0].invconv.shape
        with torch.no_grad():
            assert fake.nll(hr, lr).shape == (2,)
            assert fake.decode([torch.randn(2, *shape) for shape in fake.latent_shapes(4, 4)], lr, noise).shape == hr.shape
            assert fake.sample(lr, n=2, on_nonfinite="ignore").shape == (2, 2, 3, 16, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(model.nll(HR, LR, NOISE), FakeTensor)


class Labelled(Tensor):
    """A subclass with memory of its own."""


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", ["with memory", "without"])
def test_subclasses(model, right, kind, recorded):
    def wrapped(x: Tensor) -> Tensor:
        return x.as_subclass(Labelled) if kind == "with memory" else TwoTensor(x, x)

    with torch.set_grad_enabled(recorded):
        value = model.nll(*map(wrapped, (HR, LR, NOISE)))
        decoded = model.decode([wrapped(latent) for latent in latents(model)], wrapped(LR), wrapped(NOISE))
    value, decoded = (x.as_subclass(Tensor) if kind == "with memory" else x.a for x in (value, decoded))
    assert_same({"value": value.detach()}, {"value": right["value"]})
    assert_same({"image": decoded.detach()}, {"image": model.decode(latents(model), LR, NOISE).detach()})
