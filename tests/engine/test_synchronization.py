"""Nothing in a training step or a sampling pass makes the host wait for the device, and what is captured is what runs."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from operator_cases import marked
from support import image, no_reading, tiny_model, tiny_settings

from ncsr_fast import NCSR, graphs
from ncsr_fast.benchmarks.waiting import NoWaiting
from ncsr_fast.training.batch import Draws
from ncsr_fast.training.stages import FlowObjective

CUDA = torch.cuda.is_available()


@contextlib.contextmanager
def no_waiting():
    """On a GPU, PyTorch's own check. On a CPU, the values that may be looked at there only are not."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with no_reading(), NoWaiting():
        yield


@pytest.fixture
def model() -> NCSR:
    return tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2)).to("cuda" if CUDA else "cpu")


def batch(model: NCSR, size: int = 4, seed: int = 1) -> tuple[torch.Tensor, ...]:
    like = model.levels[0].actnorm_bias
    shapes = ((2, 3, 4 * size, 4 * size), (2, 3, size, size), (2, 3, 4 * size, 4 * size))
    return tuple(image(*shape, seed=seed + i).to(like) for i, shape in enumerate(shapes))


def test_the_check_sees_what_waits():
    with pytest.raises(RuntimeError, match="wait|synchroniz"), no_waiting():
        torch.ones(3, device="cuda" if CUDA else "cpu").sum().item()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_training_step(model, checkpoint):
    model.checkpoint = checkpoint
    hr, lr, noise = batch(model)
    step = graphs.TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.01, fused=True), max_grad_norm=1.0, graph=False)
    step(hr, lr, noise)  # kernels are chosen and loaded
    with no_waiting():
        step(hr, lr, noise)


@marked("slow", lambda l1_weight: not l1_weight)
@pytest.mark.parametrize("l1_weight", [0.0, 1.0])
def test_a_step_of_the_trainer(model, l1_weight):
    """From bytes and a seed: augmentation, bicubic, noise, both losses, clipping, Adam, and the look for NaN."""
    settings = tiny_settings("unused", model=model.config, l1_weight=l1_weight)
    device = model.levels[0].actnorm_bias.device
    generator, hr = torch.Generator(device), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    step = graphs.TrainingStep(
        FlowObjective(model, settings), graphs.adam(model, 1e-3), max_grad_norm=1.0, loss=lambda o, *i: o(*i), graph=False
    )
    step(hr, None, *Draws.at_step(0, settings, generator))
    with no_waiting():
        step(hr, None, *Draws.at_step(1, settings, generator))
    assert step.counters[:2].tolist() == [2, 0]


def test_sampling_and_likelihood(model):
    hr, lr, noise = batch(model)
    sampler = graphs.Sampler(model, 3, graph=False)
    sampler(lr)
    with no_waiting(), torch.no_grad():
        sampler(lr)
        model.nll(hr, lr, noise)
        model.sample(lr, n=2, on_nonfinite="ignore")


def test_sampler_draws_what_the_model_draws(model):
    lr = batch(model)[1][..., :3]  # an odd width
    for n in (1, 3):
        generators = [torch.Generator(lr.device).manual_seed(7) for _ in range(2)]
        sampler = graphs.Sampler(model, n, graph=CUDA)
        with torch.no_grad():
            expected = model.sample(lr, n=n, temperature=0.7, generator=generators[0])
        found, first_bad = sampler(lr, 0.7, generators[1])
        assert torch.equal(found, expected)
        assert (first_bad == sampler.sound).all()
        model.levels[0].actnorm_bias.data.add_(0.1)  # the next number of samples is drawn with other weights


class OneBuffer:
    """In place of a captured graph: inputs and outputs in the same memory for every call, and a thread that calls meanwhile."""

    meanwhile: threading.Thread | None = None

    def __init__(self, function, inputs, device, warm_up):
        self.function, self.inputs = function, [tensor.clone() for tensor in inputs]
        self.outputs = [tensor.clone() for tensor in function(*inputs)]

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        thread, OneBuffer.meanwhile = OneBuffer.meanwhile, None
        if thread is not None:
            thread.start()
            thread.join(1)  # waits for this call to end, or has changed the inputs
        for own, value in zip(self.outputs, self.function(*self.inputs)):
            own.copy_(value)
        return self.outputs


@pytest.mark.skipif(CUDA, reason="stands in for a graph where there is no GPU")
def test_threads_share_a_sampler(model, monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", OneBuffer)
    monkeypatch.setattr(graphs, "_check_on_gpu", lambda model: None)
    images = [batch(model, seed=seed)[1] for seed in range(2)]
    sampler, alone = graphs.Sampler(model, 2), graphs.Sampler(model, 2, graph=False)

    def drawn(by: graphs.Sampler, lr: torch.Tensor) -> torch.Tensor:
        return by(lr, 0.5, torch.Generator().manual_seed(0))[0]

    expected, found = [drawn(alone, lr) for lr in images], []
    thread = OneBuffer.meanwhile = threading.Thread(target=lambda: found.append(drawn(sampler, images[1])))
    found.insert(0, drawn(sampler, images[0]))
    thread.join()
    assert all(torch.equal(value, of) for value, of in zip(found, expected, strict=True))


def test_gradients_alone(model):
    hr, lr, noise = batch(model)
    step = graphs.TrainingStep(model, None, graph=CUDA)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss, norm = step(hr, lr, noise)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    expected = model.nll(hr, lr, noise).mean()
    expected.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.allclose(loss, expected)
    assert torch.allclose(norm, torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def train(model: NCSR, graph: bool) -> list[torch.Tensor]:
    optimizer = graphs.adam(model, 1e-2)
    step = graphs.TrainingStep(model, optimizer, max_grad_norm=10.0, graph=graph)
    return [step(*batch(model, seed=seed))[0].clone() for seed in range(3)]


def test_a_training_step_is_the_textbook_one(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, graph=CUDA)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    model.load_state_dict(state)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99))
    for seed, loss in enumerate(losses):
        optimizer.zero_grad()
        expected = model.nll(*batch(model, seed=seed)).mean()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        assert torch.allclose(loss, expected, rtol=1e-5)
    # a step of Adam moves a weight by at most the learning rate; ReLU kinks decide a few signs
    for found, parameter in zip(weights, model.parameters()):
        assert (found - parameter).abs().mean() < 1e-3


@pytest.mark.skipif(CUDA, reason="there is a GPU to capture on")
def test_a_graph_is_refused_on_a_cpu(model):
    with pytest.raises(ValueError, match="needs a model on a GPU.*graph=False"):
        graphs.Sampler(model, 2)
    with pytest.raises(ValueError, match="needs a model on a GPU"):
        graphs.TrainingStep(model, graphs.adam(model, 1e-4))


@pytest.mark.skipif(not CUDA, reason="no GPU to capture on")
def test_an_optimizer_that_cannot_be_captured_is_refused(model):
    with pytest.raises(ValueError, match="graphs.adam"):
        graphs.TrainingStep(model, torch.optim.Adam(model.parameters()))
