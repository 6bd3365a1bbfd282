"""A flow conditioned once: what its calls differentiate is what was recorded when it was conditioned, call after call."""

from __future__ import annotations

import pytest
import torch
from support import image, tiny_model
from torch import Tensor

from ncsr_fast import NCSR


@pytest.fixture
def model() -> NCSR:
    return tiny_model(steps=2, noise_steps=(0, 1, 2))


def drawn(model: NCSR, n: int, seed: int = 0) -> list[Tensor]:
    """Latents of n images that record gradients."""
    shapes = model.latent_shapes(4, 4)
    return [image(n, *shape, seed=seed + i).sub_(0.5).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("batch, n", [(1, 1), (1, 3), (2, 2)])
def test_without_gradients_of_the_condition_every_call_has_those_of_latents_alone(model, batch, n):
    lr = image(batch, 3, 4, 4)
    with torch.no_grad():
        flow = model.condition(lr)
    for seed in range(2):
        latents = drawn(model, n, seed)
        decoded = flow.decode(latents)
        decoded.square().sum().backward()  # nothing of another call's graph is in this one's
        assert all(parameter.grad is None for parameter in model.parameters())
        given = lr.expand(n, -1, -1, -1) if batch == 1 else lr
        expected = torch.autograd.grad(model.decode(latents, given).square().sum(), latents)
        for found, wanted in zip(latents, expected):
            torch.testing.assert_close(found.grad, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))


def test_with_gradients_of_the_condition_calls_without_them_change_nothing(model):
    lr = image(2, 3, 4, 4).requires_grad_()
    flow = model.condition(lr)
    with torch.no_grad():
        flow.sample(2, generator=torch.Generator().manual_seed(0), on_nonfinite="ignore")
    latents = [latent.detach()[:, None].expand(-1, 2, -1, -1, -1) for latent in drawn(model, 2)]
    tensors = [lr, *model.levels.parameters()]
    flow.sample(2, latents=latents, on_nonfinite="ignore").sum().backward()
    found = [tensor.grad for tensor in tensors]
    assert all(gradient is not None for gradient in found)
    model.zero_grad()
    lr.grad = None
    model.condition(lr).sample(2, latents=latents, on_nonfinite="ignore").sum().backward()
    assert all(torch.equal(gradient, tensor.grad) for gradient, tensor in zip(found, tensors))
