"""SRFlow-DA's networks on the engine against their definition: values, gradients, and gradients of gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import image

from ncsr_fast.engine.deep_network import deep_network
from ncsr_fast.ops.conv3x3 import ConvolutionMethod
from ncsr_fast.ops.step_network import StepNetwork

METHODS = {"auto": ConvolutionMethod(), "reference": ConvolutionMethod(backend="reference")}


def tensors(hidden: int, reads_state: bool, layers: int = 4) -> tuple[torch.Tensor | None, torch.Tensor, StepNetwork]:
    """z1, pre and the weights, channels-last as in the engine."""

    def draw(seed: int, *shape: int) -> torch.Tensor:
        return image(*shape, seed=seed) - 0.5

    z1 = draw(0, 2, 3, 5, 4).contiguous(memory_format=torch.channels_last) if reads_state else None
    pre = draw(1, 2, hidden, 5, 4).contiguous(memory_format=torch.channels_last)
    w1 = draw(2, hidden, 3, 3, 3) if reads_state else None
    w2, b2 = draw(3, layers, hidden, hidden, 3, 3) / hidden**0.5, draw(4, layers, hidden)
    return z1, pre, StepNetwork(w1, w2, b2, draw(5, 6, hidden, 3, 3), draw(6, 6))


def defined(z1: torch.Tensor | None, pre: torch.Tensor, network: StepNetwork, residual: int) -> torch.Tensor:
    x = F.relu(pre if z1 is None else pre + F.conv2d(z1, network.w1, padding=1))
    groups = [range(first, first + (residual or 1)) for first in range(0, len(network.w2), residual or 1)]
    for group in groups:
        start = x
        for index in group:
            x = F.relu(F.conv2d(x, network.w2[index], network.b2[index], padding=1))
        x = start + x if residual else x
    return F.conv2d(x, network.w3, network.b3, padding=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("residual", [0, 2, 4])
@pytest.mark.parametrize("reads_state", [True, False], ids=["coupling", "injector"])
@pytest.mark.parametrize("hidden", [4, 16])  # by PyTorch's convolutions, and by kernels
def test_a_deep_network_is_its_definition(hidden, reads_state, residual, method):
    z1, pre, network = tensors(hidden, reads_state)
    leaves = [tensor.requires_grad_() for tensor in (z1, pre, *network) if tensor is not None]
    expected = defined(z1, pre, network, residual)
    found = deep_network(z1, pre, network, residual, METHODS[method])
    with torch.no_grad():
        without = deep_network(z1, pre, network, residual, METHODS[method])
    for value in (found, without):
        assert (value - expected).abs().max() < 1e-12 * expected.abs().max()
    gradients = [torch.autograd.grad(value.sin().sum(), leaves) for value in (found, expected)]
    for gradient, right in zip(*gradients):
        assert (gradient - right).abs().max() < 1e-12 * right.abs().max()


def test_gradients_of_some_tensors():
    """Those of the weights are not made where none of them wants one."""
    z1, pre, network = tensors(4, True)
    pre.requires_grad_()
    found = torch.autograd.grad(deep_network(z1, pre, network, 2, ConvolutionMethod()).sin().sum(), pre)[0]
    right = torch.autograd.grad(defined(z1, pre, network, 2).sin().sum(), pre)[0]
    assert (found - right).abs().max() < 1e-12 * right.abs().max()


def test_gradients_of_gradients():
    z1, pre, network = tensors(4, True, layers=2)
    leaves = [tensor.requires_grad_() for tensor in (z1, pre, *network)]
    found = []
    for value in (deep_network(z1, pre, network, 2, ConvolutionMethod()), defined(z1, pre, network, 2)):
        first = torch.autograd.grad(value.sin().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves))
    for gradient, right in zip(*found):
        assert (gradient - right).abs().max() < 1e-12 * right.abs().max()
