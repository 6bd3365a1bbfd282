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


class StepNetwork(NamedTuple):
    """The weights of a network, actnorms and scales folded in; or their gradients."""

    w1: Tensor | None  # (hidden, C, 3, 3); None: the network does not read the state
    w2: Tensor  # (hidden, hidden, 1, 1)
    b2: Tensor  # (hidden,)
    w3: Tensor  # (outputs, hidden, 3, 3)
    b3: Tensor  # (outputs,)


class Layers(NamedTuple):
    """What a network's backward pass leaves to the gradients of its weights: `NetworkPass` has them too."""

    h1: Tensor | None
    h2: Tensor
    dh2: Tensor | None
    sums: Tensor | None = None


class NetworkPass(NamedTuple):
    """The tensors of a network that the gradients of its weights are made of, all but z1 in its dtype.

    Args:
        z1: (B, C, H, W) of any dtype, or None.
        pre: Pre-activation of h1 (B, hidden, H, W), but for what z1 adds to it.
        h1: (B, hidden, H, W); None: the positive part of pre, z1 being None, or not needed.
        h2: (B, hidden, H, W).
        dpre: Gradient of the pre-activation of h1.
        dh2: Gradient of the pre-activation of h2; None: not needed.
        dh: Gradient (B, outputs, H, W) of the output.
        sums: (parts, hidden² + hidden) in float32, parts of the gradients of w2 and, behind it, of b2, which then need neither
            h1 nor dh2; None: there are none.
    """

    z1: Tensor | None
    pre: Tensor
    h1: Tensor | None
    h2: Tensor
    dpre: Tensor
    dh2: Tensor | None
    dh: Tensor
    sums: Tensor | None = None


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
        found.append(Layers(h1, h2, dh2))
    return found


def weight_gradients(passes: Sequence[NetworkPass], gradients: Sequence[StepNetwork], method: ConvolutionMethod) -> None:
    """`ncsr_fast.ops.reference.step_network_weights_backward` by convolutions of this method."""
    for own, written in zip(passes, gradients):
        _, dw3, db3 = _weight_gradient(own.dh, own.h2, written.w3, method)
        dw2, db2 = _hidden_gradients(own, written.w2, method)
        dw1 = None
        if own.z1 is not None and written.w1 is not None:
            dw1 = _weight_gradient(own.dpre, own.z1.to(own.h2.dtype), written.w1, method, needs_bias=False)[1]
        for gradient, found in zip(written, (dw1, dw2, db2, dw3, db3)):
            if gradient is not None and found is not None:
                gradient.copy_(found)


def _hidden_gradients(own: NetworkPass, w2: Tensor, method: ConvolutionMethod) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of w2 and b2."""
    if own.sums is not None:
        dw2, db2 = own.sums.double().sum(dim=0).split([w2.numel(), len(w2)])
        return dw2.view(w2.shape), db2
    assert own.dh2 is not None
    return _weight_gradient(own.dh2, F.relu(own.pre) if own.h1 is None else own.h1, w2, method)[1:]


def _input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, method: ConvolutionMethod, relu: tuple[Tensor, float] | None = None
) -> Tensor:
    return cast(Tensor, convolution_backward(dy, x, weight, (True, False, False), method, relu=relu)[0])


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, method: ConvolutionMethod, needs_bias: bool = True) -> Gradients:
    return convolution_backward(dy, x, weight, (False, True, needs_bias), method)
