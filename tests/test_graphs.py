"""A replayed graph does what a step or a pass without one does, whatever happened to the model since the capture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulated_graphs import emulated_graphs  # noqa: F401 - a fixture
from operator_cases import marked
from support import image, tiny_model
from torch import nn

from ncsr_fast import NCSR, graphs

pytestmark = pytest.mark.usefixtures("emulated_graphs")


@pytest.fixture
def model() -> NCSR:
    """A model of which every operator is PyTorch's."""
    made = tiny_model(dtype=torch.float32, steps=1, noise_steps=(0, 1, 1), transition_steps=1)
    made.options = replace(made.options, backend="reference")
    return made


def batch(seed: int = 1, size: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = (2, 3, 4 * size, 4 * size), (2, 3, size, size), (2, 3, 4 * size, 4 * size)
    return [image(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)]


def adam(model: nn.Module, *groups: dict) -> torch.optim.Adam:
    optimizer = graphs.adam(list(groups) or model, 1e-2)
    for group in optimizer.param_groups:
        group["capturable"] = True  # which fused Adam has on a CPU as well
    return optimizer


class Twins:
    """Two equal training steps, one as a graph and one without, to which the same things happen."""

    def __init__(self, model: NCSR, make: Callable[[NCSR], torch.optim.Optimizer] = adam) -> None:
        self.models = model, copy.deepcopy(model)
        self.steps = [
            graphs.TrainingStep(one, make(one), max_grad_norm=10.0, graph=graph)
            for one, graph in zip(self.models, (True, False))
        ]

    def each(self, change: Callable[[graphs.TrainingStep], object]) -> None:
        for step in self.steps:
            change(step)

    def check(self, *inputs: torch.Tensor) -> None:
        """One more step leaves the same losses, norms, gradients, weights and counts."""
        (loss, norm), (right_loss, right_norm) = (step(*inputs) for step in self.steps)
        torch.testing.assert_close((loss, norm), (right_loss, right_norm))
        for (name, found), expected in zip(self.models[0].named_parameters(), self.models[1].parameters()):
            torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
            assert (found.grad is None) == (expected.grad is None), name
            if found.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, name=name: f"gradient of {name}: {text}")
        assert torch.equal(self.steps[0].counters, self.steps[1].counters)


@pytest.mark.slow
def test_steps_are_replayed(model, emulated_graphs):  # noqa: F811
    twins = Twins(model)
    for seed in range(3):
        twins.check(*batch(seed))
    twins.each(lambda step: step.optimizer.param_groups[0]["lr"].fill_(3e-3))
    twins.check(*batch(5))
    assert len(emulated_graphs) == 1
    twins.check(*batch(6, size=6))
    twins.check(*batch(7))
    assert len(emulated_graphs) == 2


def moved(step: graphs.TrainingStep) -> None:
    for parameter in step.model.parameters():
        parameter.data = parameter.data.clone()


def resumed(step: graphs.TrainingStep) -> None:
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def frozen_and_thawed(step: graphs.TrainingStep) -> None:
    step.model.freeze_for_inference()
    step.model.unfreeze()


CHANGES = {
    "moved": moved,
    "resumed": resumed,
    "encoder frozen": lambda step: step.model.encoder.requires_grad_(False),
    "weight decay": lambda step: step.optimizer.param_groups[0].update(weight_decay=0.3),
    "clipping": lambda step: setattr(step, "max_grad_norm", 1e-3),
    "option": lambda step: setattr(step.model, "checkpoint", False),
}


@marked("slow", lambda change: change not in ("moved", "weight decay"))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.slow
def test_a_change_is_captured(model, change, emulated_graphs):  # noqa: F811
    twins = Twins(model)
    twins.check(*batch())
    twins.each(CHANGES[change])
    twins.check(*batch(2))
    twins.check(*batch(3))
    assert len(emulated_graphs) == 2


def test_what_changes_nothing_is_not_captured_again(model, emulated_graphs):  # noqa: F811
    twins = Twins(model)
    twins.check(*batch())
    twins.each(lambda step: step.model.zero_grad())
    twins.each(lambda step: step.model.load_state_dict(copy.deepcopy(step.model.state_dict())))
    twins.each(frozen_and_thawed)
    twins.check(*batch(2))
    assert len(emulated_graphs) == 1


@pytest.mark.slow
def test_an_encoder_that_is_trained_from_the_middle(model):
    """Its parameters come first in the optimizer, whose state they enter last."""

    def make(one: NCSR) -> torch.optim.Optimizer:
        return adam(one, {"params": list(one.encoder.parameters())}, {"params": list(one.levels.parameters())})

    model.encoder.requires_grad_(False)
    twins = Twins(model, make)
    twins.check(*batch())
    twins.each(lambda step: step.model.encoder.requires_grad_(True))
    twins.check(*batch(2))
    twins.check(*batch(3))


def test_inputs_of_another_dtype_are_captured(model, emulated_graphs):  # noqa: F811
    step = graphs.TrainingStep(model, None, loss=lambda one, x: (next(one.parameters()).sum() * x).sum())
    assert step(torch.tensor([2.5]))[0].item() != step(torch.tensor([2]))[0].item()
    assert len(emulated_graphs) == 2


@pytest.mark.slow
def test_ddp_is_warmed_up_longer(model, monkeypatch, emulated_graphs):  # noqa: F811
    monkeypatch.setattr(graphs, "DistributedDataParallel", NCSR)
    graphs.TrainingStep(model, adam(model))(*batch())
    assert emulated_graphs == [11]


def moved_weights(model: NCSR) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.001


def another_parameter(model: NCSR) -> None:
    model.levels[0].actnorm_bias = nn.Parameter(model.levels[0].actnorm_bias.detach() + 0.1)


SAMPLED = {
    "weights edited": lambda model: model.levels[0].actnorm_bias.data.add_(0.1),
    "frozen": lambda model: model.freeze_for_inference(),
    "moved": moved_weights,
    "another parameter": another_parameter,
}


def assert_samples(sampler: graphs.Sampler) -> None:
    lr = image(1, 3, 4, 4).float()
    eager = graphs.Sampler(sampler.model, sampler.n, graph=False)
    (found, bad), (expected, right_bad) = (s(lr, 0.8, torch.Generator().manual_seed(3)) for s in (sampler, eager))
    torch.testing.assert_close(found, expected)
    assert torch.equal(bad, right_bad)


@pytest.mark.parametrize("change", SAMPLED)
def test_samples_of_a_changed_model(model, change, emulated_graphs):  # noqa: F811
    sampler = graphs.Sampler(model, 2)
    assert_samples(sampler)
    SAMPLED[change](model)
    assert_samples(sampler)
    assert len(emulated_graphs) == (1 if change == "weights edited" else 2)


def test_samples_of_a_model_that_is_frozen_again(model, emulated_graphs):  # noqa: F811
    """The constants of before are gone, and the weights are others."""
    sampler = graphs.Sampler(model.freeze_for_inference(), 2)
    assert_samples(sampler)
    assert_samples(sampler)
    assert len(emulated_graphs) == 1
    model.unfreeze()
    with torch.no_grad():
        model.levels[0].actnorm_bias.add_(0.1)
    model.freeze_for_inference()
    assert_samples(sampler)
    assert len(emulated_graphs) == 2
