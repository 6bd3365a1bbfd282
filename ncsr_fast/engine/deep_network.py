"""The networks of SRFlow-DA, 3×3 → (3×3)ⁿ → 3×3, by one convolution after the other.

    x_0 = relu(w1 ∗ z1 + pre),   r_i = relu(w2_i ∗ x_{i-1} + b2_i),   h = w3 ∗ x_n + b3

where x_i = r_i, or in a network with residuals of m layers, behind every m-th of them, x_i = x_{i-m} + r_i. `pre` is the
pre-activation of the first layer, the part of it that depends on the condition alone, with the bias. The weights are a
`StepNetwork` whose w2 and b2 have a leading dimension of n.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.conv3x3 import (
    ConvolutionMethod,
    convolution,
    convolution_backend,
    convolution_backward,
    convolution_forward,
)
from ncsr_fast.ops.operator import Operator, Tensors
from ncsr_fast.ops.step_network import NetworkTensors, StepNetwork

Hidden = tuple[Tensor, ...]  # x_0, then of every layer r_i, and behind it x_i where a residual ends


def deep_network(z1: Tensor | None, pre: Tensor, network: StepNetwork, residual: int, method: ConvolutionMethod) -> Tensor:
    """The output h (B, outputs, H, W), in the dtype of pre. Differentiable; the hidden layers are recomputed.

    Args:
        z1: (B, C, H, W), or None for a network that does not read the state.
        pre: (B, hidden, H, W).
        network: The weights.
        residual: m; 0: no residuals.
        method: How to convolve.
    """
    return _deep_network((z1, pre, *network), residual, method)[0]


def hidden_layers(x: Tensor, network: StepNetwork, residual: int, method: ConvolutionMethod) -> Hidden:
    """The hidden layers behind the first one, x_0, where autograd records nothing."""
    found, start = [], x
    for index, (weight, bias) in enumerate(zip(network.w2, network.b2), start=1):
        x = _activated(x, weight, bias, method)
        found.append(x)
        if residual and index % residual == 0:
            x = start = start + x
            found.append(x)
    return tuple(found)


def deep_layers(
    z1: Tensor | None, pre: Tensor, network: StepNetwork, residual: int, method: ConvolutionMethod
) -> tuple[Tensor, ...]:
    """The hidden layers and the output, where autograd records nothing."""
    x = _first_layer(z1, pre, network, method)
    hidden = (x, *hidden_layers(x, network, residual, method))
    return *hidden, convolution_forward(hidden[-1], network.w3, network.b3, method)


def deep_gradients(
    network: StepNetwork,
    z1: Tensor | None,
    hidden: Hidden,
    dh: Tensor,
    needs_weights: bool,
    residual: int,
    method: ConvolutionMethod,
    dpre: Tensor,
) -> tuple[Tensor | None, StepNetwork | None]:
    """As `ncsr_fast.ops.step_network.network_gradients`, with all hidden layers."""
    wanted, count = (True, needs_weights, needs_weights), len(network.w2)
    dw2 = torch.empty_like(network.w2, memory_format=torch.contiguous_format) if needs_weights else None
    db2: list[Tensor] = []
    layers = list(hidden)
    x = layers.pop()
    # dx: of the sum in a residual as it is, of any other layer before its ReLU
    dx, dw3, db3 = convolution_backward(dh.to(x.dtype), x, network.w3, wanted, method, relu=None if residual else (x, 0.0))
    dsum: Tensor | None = None
    for index in reversed(range(count)):
        if residual and (index + 1) % residual == 0:  # x = start + r: the gradient of start gets that of the sum as well
            dsum, dx = dx, torch.ops.aten.threshold_backward(dx, layers.pop(), 0)
        x = layers.pop()
        starts = bool(residual) and index % residual == 0
        dweight = None if dw2 is None else dw2[index]
        dx, _, dbias = convolution_backward(
            cast(Tensor, dx),
            x,
            network.w2[index],
            wanted,
            method,
            dsum if starts else None,
            None if starts else (x, 0.0),
            dweight,
        )
        db2 += [] if dbias is None else [dbias]
    if residual:
        torch.ops.aten.threshold_backward.grad_input(dx, x, 0, grad_input=dpre)
    else:
        dpre.copy_(cast(Tensor, dx))
    dz1, dw1 = None, None
    if z1 is not None and network.w1 is not None:
        dz1, dw1, _ = convolution_backward(dpre, z1.to(x.dtype), network.w1, (True, needs_weights, False), method)
    if dw2 is None:
        return dz1, None
    return dz1, StepNetwork(dw1, dw2, torch.stack(db2[::-1]), cast(Tensor, dw3), cast(Tensor, db3))


def _first_layer(z1: Tensor | None, pre: Tensor, network: StepNetwork, method: ConvolutionMethod) -> Tensor:
    if z1 is None or network.w1 is None:
        return F.relu(pre)
    return convolution_forward(z1.to(pre.dtype), network.w1, None, method).add_(pre).relu_()


def _activated(x: Tensor, weight: Tensor, bias: Tensor, method: ConvolutionMethod) -> Tensor:
    """relu(weight ∗ x + bias), in one kernel where there is one."""
    forward = kernels(convolution_backend(x, weight, method)).conv3x3_forward
    return forward(x, weight, bias, slope=0.0, tf32=method.tf32)


def _forward(tensors: NetworkTensors, residual: int, method: ConvolutionMethod) -> tuple[tuple[Tensor], Tensors]:
    (z1, pre), network = tensors[:2], StepNetwork(*tensors[2:])
    x = start = _first_layer(z1, pre, network, method)
    for index, (weight, bias) in enumerate(zip(network.w2, network.b2), start=1):
        x = _activated(x, weight, bias, method)
        if residual and index % residual == 0:
            x = start = start.add_(x)
    return (convolution_forward(x, network.w3, network.b3, method),), ()


def _backward(
    grads: tuple[Tensor],
    tensors: NetworkTensors,
    _: Tensors,
    needed: tuple[bool, ...],
    residual: int,
    method: ConvolutionMethod,
) -> Tensors:
    (z1, pre), network = tensors[:2], StepNetwork(*tensors[2:])
    hidden = deep_layers(z1, pre, network, residual, method)[:-1]
    dpre = torch.empty_like(hidden[0])
    dz1, dnetwork = deep_gradients(network, z1, hidden, grads[0], any(needed[2:]), residual, method, dpre)
    return None if z1 is None or dz1 is None else dz1.to(z1.dtype), dpre, *(dnetwork or (None,) * 5)


def _reference(*arguments: Tensor | int | ConvolutionMethod) -> tuple[Tensor]:
    z1, pre, w1, w2, b2, w3, b3 = cast(NetworkTensors, arguments[:7])
    residual, method = cast(int, arguments[7]), cast(ConvolutionMethod, arguments[8])
    first = pre if z1 is None or w1 is None else convolution(z1.to(pre.dtype), w1, None, method) + pre
    x = start = F.relu(first)
    for index, (weight, bias) in enumerate(zip(w2.unbind(), b2.unbind()), start=1):
        x = F.relu(convolution(x, weight, bias, method))
        if residual and index % residual == 0:
            x = start = start + x
    return (convolution(x, w3, b3, method),)


_deep_network = Operator("DeepNetwork", forward=_forward, backward=_backward, reference=_reference)
