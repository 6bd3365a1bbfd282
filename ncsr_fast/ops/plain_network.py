"""The networks of injectors and couplings, and their gradients, in PyTorch: `ncsr_fast.ops.reference` has these functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.ops.conv3x3 import ConvolutionMethod
from ncsr_fast.ops.coupled_step import composed_of
from ncsr_fast.ops.network_gradients import Layers, NetworkPass, StepNetwork, data_gradients, weight_gradients
from ncsr_fast.ops.plain_convolution import convolve


def step_network_forward(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
    packed: Sequence[Tensor] = (),
) -> Tensor:
    """h (B, outputs, H, W) = w3 ∗ h2 + b3 with h1 = relu(w1 ∗ z1 + pre) and h2 = relu(w2 · h1 + b2), in the dtype of pre.

    Args:
        z1: (B, C, H, W) of any dtype, or None with w1 None.
        pre: (B, hidden, H, W).
        w1: (hidden, C, 3, 3).
        w2: (hidden, hidden, 1, 1).
        b2: (hidden,).
        w3: (outputs, hidden, 3, 3).
        b3: (outputs,).
        tf32: Permit a GPU to round float32 operands to TF32.
        packed: Of `step_network_weights` of the same backend, each at the number of the network, or nothing.
    """
    return step_network_layers(z1, pre, w1, w2, b2, w3, b3, tf32=tf32)[2]


def step_network_layers(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """h1, h2 and h of `step_network_forward`."""
    h1, h2 = step_network_hidden(z1, pre, w1, w2, b2, w3, b3, tf32=tf32)
    return h1, h2, convolve(h2, w3, b3, tf32)


def step_network_hidden(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """h1 and h2 of `step_network_forward`, for its arguments."""
    h1 = F.relu(pre if z1 is None or w1 is None else convolve(z1.to(pre.dtype), w1, None, tf32) + pre)
    return h1, F.relu(convolve(h1, w2, b2, tf32))


def step_network_backward(
    dh: Sequence[Tensor],
    z1: Sequence[Tensor | None],
    pre: Sequence[Tensor],
    hidden: Sequence[tuple[Tensor | None, Tensor]] | None,
    networks: Sequence[StepNetwork],
    dpre: Sequence[Tensor],
    dz1: Sequence[Tensor | None],
    *,
    tf32: bool = False,
    packed: Sequence[Sequence[Tensor]] = (),
) -> list[Layers]:
    """Gradients of the inputs of networks of one shape.

    Args:
        dh: Of each network, the gradient (B, outputs, H, W) of its output, in the dtype of pre.
        z1: (B, C, H, W) of any dtype, or None.
        pre: (B, hidden, H, W).
        hidden: h1, None where it is the positive part of pre, and h2 (B, hidden, H, W). None: they are recomputed.
        networks: The weights.
        dpre: Are written the gradients (B, hidden, H, W) of pre; all with the same strides.
        dz1: Is added the gradient (B, C, H, W) of z1, in any dtype; None: not wanted.
        tf32: Permit a GPU to round float32 operands to TF32.
        packed: Of each network those of `step_network_weights` of the same backend, then those transposed; or nothing.

    Returns:
        Of each network h1, or None, h2, and the gradient of the pre-activation of h2; or what `NetworkPass` has in their place.
    """
    if hidden is None:
        hidden = [
            step_network_hidden(own_z1, own_pre, *network, tf32=tf32) for own_z1, own_pre, network in zip(z1, pre, networks)
        ]
    return data_gradients(dh, pre, hidden, networks, dpre, dz1, ConvolutionMethod(tf32, "reference"))


def step_network_weights_backward(
    passes: Sequence[NetworkPass], gradients: Sequence[StepNetwork], *, tf32: bool = False
) -> None:
    """Write the gradients of the weights of networks of one shape to `gradients`, in the dtype that those have."""
    weight_gradients(passes, gradients, ConvolutionMethod(tf32, "reference"))


step_network_coupled = composed_of("reference")


def step_network_tails(
    pre: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, *, tf32: bool = False, packed: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """The outputs of K networks that do not read the state.

    Args:
        pre: (B, K·hidden, H, W), of one after the other.
        w2: (K, hidden, hidden, 1, 1).
        b2: (K, hidden).
        w3: (K, outputs, hidden, 3, 3).
        b3: (K, outputs).
        tf32: Permit a GPU to round float32 operands to TF32.
        packed: Of `step_network_weights` of the same backend, or nothing.
    """
    networks = zip(pre.chunk(len(w2), dim=1), w2, b2, w3, b3, strict=True)
    return tuple([step_network_forward(None, own, None, *weights, tf32=tf32) for own, *weights in networks])


def step_network_weights(
    w1: Tensor | None, w2: Tensor, w3: Tensor, dtype: torch.dtype, transposed: bool = False
) -> tuple[Tensor, ...]:
    """The weights of K networks, stacked, as the backend reads them best: tensors (K, …), here none.

    Args:
        w1: (K, hidden, C, 3, 3) or None.
        w2: (K, hidden, hidden, 1, 1).
        w3: (K, outputs, hidden, 3, 3).
        dtype: In which the networks are evaluated.
        transposed: For `step_network_backward`, else for the forward functions.
    """
    return ()
