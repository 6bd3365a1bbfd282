"""A flow is used as any module: called, hooked, wrapped, and with other parameters in place of its own."""

from __future__ import annotations

import pytest
import torch
from support import image, tiny_model

from ncsr_fast import graphs

LR, HR, NOISE = image(2, 3, 4, 4, seed=1), image(2, 3, 16, 16, seed=2), 0.1 * image(2, 3, 16, 16, seed=3)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad]))


def test_a_call_is_the_likelihood_and_runs_hooks():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert torch.equal(model(HR, LR, NOISE), 2 * model.nll(HR, LR, NOISE))
    assert torch.equal(model(HR, LR), 2 * model.nll(HR, LR))
    assert seen == [3, 2]


@pytest.mark.parametrize("engine", ["fused", "plain"])
def test_with_other_parameters(engine):
    """Values and gradients are those of a model that has them; its own are neither used nor given gradients."""
    model, other = tiny_model(), tiny_model(seed=1)
    model.engine = other.engine = engine
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in other.named_parameters()}
    nll = torch.func.functional_call(model, parameters, (HR, LR, NOISE))
    assert torch.equal(nll, other(HR, LR, NOISE))
    nll.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = [parameters[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, gradients(other, other(HR, LR, NOISE).sum()), strict=True):
        assert torch.equal(parameter.grad, gradient)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, parameters, (HR, LR)), other(HR, LR))
        assert not torch.equal(model(HR, LR), other(HR, LR))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", [torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel])
def test_in_wrappers_for_several_devices(wrapper, process_group):
    model = tiny_model()
    expected = gradients(model, model(HR, LR, NOISE).mean())
    wrapped = wrapper(model)
    graphs.mean_nll(wrapped, HR, LR, NOISE).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    wrapped.zero_grad()


def test_a_step_of_training_takes_wrappers(process_group):
    """As it takes the model itself: the weights after a step are the same."""
    models = [tiny_model(dtype=torch.float32) for _ in range(2)]
    batch = [tensor.float() for tensor in (HR, LR, NOISE)]
    for model, wrapped in zip(models, (models[0], torch.nn.parallel.DistributedDataParallel(models[1]))):
        graphs.TrainingStep(wrapped, graphs.adam(model, lr=1e-3), graph=False)(*batch)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert not torch.equal(models[0].levels[0].invconv, tiny_model(dtype=torch.float32).levels[0].invconv)
