"""One small network of a step: evaluated, and differentiated with its hidden layers computed anew.

h1 = relu(w1 ∗ z1 + pre),   h2 = relu(w2 · h1 + b2),   h = w3 ∗ h2 + b3
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.engine.convolution import ConvolutionMethod, convolution, convolution_backward
from ncsr_fast.layout import has_memory, traced
from ncsr_fast.ops._backends import implementation


class Network(NamedTuple):
    """One of `folding.Networks`."""

    w1: Tensor | None
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor


def evaluate(network: Network, z1: Tensor | None, pre: Tensor, backend: str, method: ConvolutionMethod) -> Tensor:
    """h (B, outputs, H, W) in the dtype of pre. Differentiable.

    z1       (B, kept, H, W) of any dtype, None for an injector
    pre      (B, hidden, H, W); a batch of 1 is shared by all of z1's
    backend  "native" has one kernel for the three layers, for CPU tensors without gradients; else PyTorch's convolutions
    """
    if not _fused(network, z1, pre, backend):
        return _plain_layers(network, z1, pre, method)[2]
    if z1 is not None:
        pre = pre.expand(z1.shape[0], -1, -1, -1)
    return implementation("native").network_fwd(z1, pre, *network)


def layers(
    network: Network, z1: Tensor | None, pre: Tensor, backend: str, method: ConvolutionMethod
) -> tuple[Tensor, Tensor, Tensor]:
    """h1, h2 and h, of a pre of as many samples as z1."""
    if not _fused(network, z1, pre, backend):
        return _plain_layers(network, z1, pre, method)
    h1, h2 = (torch.empty_like(pre, memory_format=torch.channels_last) for _ in range(2))
    return h1, h2, implementation("native").network_fwd(z1, pre, *network, hidden=(h1, h2))


def _fused(network: Network, z1: Tensor | None, pre: Tensor, backend: str) -> bool:
    """Whether one kernel can do it."""
    tensors = [tensor for tensor in (z1, pre, *network) if tensor is not None]
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    there = backend == "native" and pre.device.type == "cpu" and pre.dtype in (torch.float32, torch.float64)
    return there and not recorded and not traced() and all(map(has_memory, tensors))


def _plain_layers(network: Network, z1: Tensor | None, pre: Tensor, method: ConvolutionMethod) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch's convolutions. Differentiable."""
    h1, h2 = hidden(network, z1, pre, method)
    return h1, h2, convolution(h2, network.w3, network.b3, method)


def hidden(network: Network, z1: Tensor | None, pre: Tensor, method: ConvolutionMethod) -> tuple[Tensor, Tensor]:
    """h1 and h2, by PyTorch's convolutions. Differentiable."""
    h1 = F.relu(pre if z1 is None else convolution(z1.to(pre.dtype), network.w1, None, method) + pre)
    return h1, F.relu(convolution(h1, network.w2, network.b2, method))


def gradients(
    network: Network,
    z1: Tensor | None,
    h1: Tensor,
    h2: Tensor,
    dh: Tensor,
    weights: bool,
    method: ConvolutionMethod,
    dpre: Tensor,
) -> tuple[Tensor | None, Network | None]:
    """The gradients of z1 (in the dtype of the network), and with `weights` of the network's tensors; that of pre to `dpre`."""
    dh = dh.to(h2.dtype)
    relu = h2, 0.0
    dh2, dw3, db3 = convolution_backward(dh, h2, network.w3, (True, weights, weights), method, gate=relu)
    dh1, dw2, db2 = convolution_backward(dh2, h1, network.w2, (True, weights, weights), method)
    torch.ops.aten.threshold_backward.grad_input(dh1, h1, 0, grad_input=dpre)
    dz1, dw1 = None, None
    if z1 is not None:
        dz1, dw1, _ = convolution_backward(dpre, z1.to(h1.dtype), network.w1, (True, weights, False), method)
    return dz1, Network(dw1, dw2, db2, dw3, db3) if weights else None
