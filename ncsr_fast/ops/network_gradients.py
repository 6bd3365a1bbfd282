"""The gradients of the networks of injectors and couplings by single convolutions, for backends without kernels of their own.

    dh2 = (w3ᵀ ∗ dh) ⊙ [h2 > 0],   dpre = (w2ᵀ · dh2) ⊙ [h1 > 0],   dz1 += w1ᵀ ∗ dpre

and of each weight the product of its output's gradient and its input, summed over all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution_backward
from ncsr_fast.ops.plain_convolution import Gradients

Layers = tuple[Tensor | None, Tensor, Tensor]  # h1, None where it is the positive part of pre, h2 and dh2


class StepNetwork(NamedTuple):
    """The weights of a network, actnorms and scales folded in; or their gradients."""

    w1: Tensor | None  # (hidden, C, 3, 3); None: the network does not read the state
    w2: Tensor  # (hidden, hidden, 1, 1)
    b2: Tensor  # (hidden,)
    w3: Tensor  # (outputs, hidden, 3, 3)
    b3: Tensor  # (outputs,)


class NetworkPass(NamedTuple):
    """The tensors of a network that the gradients of its weights are made of, all but z1 in its dtype.

    Args:
        z1: (B, C, H, W) of any dtype, or None.
        pre: Pre-activation of h1 (B, hidden, H, W), but for what z1 adds to it.
        h1: (B, hidden, H, W); None: the positive part of pre, z1 being None.
        h2: (B, hidden, H, W).
        dpre: Gradient of the pre-activation of h1.
        dh2: Gradient of the pre-activation of h2.
        dh: Gradient (B, outputs, H, W) of the output.
    """

    z1: Tensor | None
    pre: Tensor
    h1: Tensor | None
    h2: Tensor
    dpre: Tensor
    dh2: Tensor
    dh: Tensor


def data_gradients(
    dh: Sequence[Tensor],
    pre: Sequence[Tensor],
    hidden: Sequence[tuple[Tensor | None, Tensor]],
    networks: Sequence[StepNetwork],
    dpre: Sequence[Tensor],
    dz1: Sequence[Tensor | None],
    method: ConvolutionMethod,
) -> list[Layers]:
    """`ncsr_fast.ops.reference.step_network_backward` by convolutions of this method, from the hidden layers."""
    found: list[Layers] = []
    for own_dh, own_pre, (h1, h2), network, own_dpre, own_dz1 in zip(dh, pre, hidden, networks, dpre, dz1):
        h1 = F.relu(own_pre) if h1 is None else h1
        dh2 = _input_gradient(own_dh, h2, network.w3, method, relu=(h2, 0.0))
        dh1 = _input_gradient(dh2, h1, network.w2, method)
        torch.ops.aten.threshold_backward.grad_input(dh1, h1, 0, grad_input=own_dpre)
        if own_dz1 is not None and network.w1 is not None:
            own_dz1.add_(_input_gradient(own_dpre, torch.empty_like(own_dz1, dtype=own_dpre.dtype), network.w1, method))
        found.append((h1, h2, dh2))
    return found


def weight_gradients(passes: Sequence[NetworkPass], gradients: Sequence[StepNetwork], method: ConvolutionMethod) -> None:
    """`ncsr_fast.ops.reference.step_network_weights_backward` by convolutions of this method."""
    for own, written in zip(passes, gradients):
        _, dw3, db3 = _weight_gradient(own.dh, own.h2, written.w3, method)
        _, dw2, db2 = _weight_gradient(own.dh2, F.relu(own.pre) if own.h1 is None else own.h1, written.w2, method)
        dw1 = None
        if own.z1 is not None and written.w1 is not None:
            dw1 = _weight_gradient(own.dpre, own.z1.to(own.h2.dtype), written.w1, method, needs_bias=False)[1]
        for gradient, found in zip(written, (dw1, dw2, db2, dw3, db3)):
            if gradient is not None and found is not None:
                gradient.copy_(found)


def _input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, method: ConvolutionMethod, relu: tuple[Tensor, float] | None = None
) -> Tensor:
    return cast(Tensor, convolution_backward(dy, x, weight, (True, False, False), method, relu=relu)[0])


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, method: ConvolutionMethod, needs_bias: bool = True) -> Gradients:
    return convolution_backward(dy, x, weight, (False, True, needs_bias), method)
