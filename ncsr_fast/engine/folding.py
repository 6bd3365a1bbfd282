"""Folding of parameters: actnorms and scales merged into the convolutions beside them, 1×1 convolutions composed.

Folding is differentiable: autograd carries the gradients to the parameters.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ncsr_fast.ops.contract import compute_dtype
from ncsr_fast.ops.fold import folded
from ncsr_fast.ops.step_network import StepNetwork

LOG_SCALE = 3.0  # factor of `logs` in a zero-initialised convolution (Glow)


class NetworkParameters(Protocol):
    """The stacked parameters of K networks: see `ncsr_fast.flow.networks.StackedNetworks`."""

    conv1: Tensor
    norm1_bias: Tensor
    norm1_logs: Tensor
    conv2: Tensor
    norm2_bias: Tensor
    norm2_logs: Tensor
    conv3: Tensor
    bias3: Tensor
    logs3: Tensor


class Networks(NamedTuple):
    """K folded networks: the weights of `ncsr_fast.ops.step_network`, stacked along a leading dimension."""

    w1: Tensor | None  # (K, hidden, C, 3, 3); None: the networks do not read the state
    w2: Tensor  # (K, hidden, hidden, 1, 1)
    b2: Tensor  # (K, hidden)
    w3: Tensor  # (K, outputs, hidden, 3, 3)
    b3: Tensor  # (K, outputs)

    def unbind(self) -> list[StepNetwork]:
        """The networks one by one."""
        w1 = itertools.repeat(None) if self.w1 is None else self.w1.unbind()
        return list(map(StepNetwork, w1, self.w2.unbind(), self.b2.unbind(), self.w3.unbind(), self.b3.unbind()))


class Hoisted(NamedTuple):
    """The part of the first layers of K networks that reads the condition: pre = weight ∗ condition + bias."""

    weight: Tensor  # (K·hidden, condition, 3, 3)
    bias: Tensor  # (K·hidden,)


class Mixing(NamedTuple):
    """Actnorms and 1×1 convolutions of a level as K affine maps y = mix·x + offset of a pixel, in the order of encoding.

    The transition steps are composed with the first map, because nothing separates them from the first conditional step.
    """

    mix: Tensor  # (K, C, C)
    offset: Tensor  # (K, C)
    logdet: Tensor  # () float64, log-det of one pixel through all maps


def fold_networks(parameters: NetworkParameters, state_channels: int, dtype: torch.dtype) -> tuple[Networks, Hoisted]:
    """Folded networks in `dtype`; their first `state_channels` input channels are z1, and the others the condition."""
    scale1, scale2 = torch.exp(parameters.norm1_logs), torch.exp(parameters.norm2_logs)
    scale3 = torch.exp(LOG_SCALE * parameters.logs3)
    conv1 = (parameters.conv1 * _filters(scale1)).to(dtype)
    w1, weight = conv1.split((state_channels, conv1.shape[2] - state_channels), dim=2)
    networks = Networks(
        w1.contiguous() if state_channels else None,
        (parameters.conv2 * _filters(scale2)).to(dtype),
        (parameters.norm2_bias * scale2).to(dtype),
        (parameters.conv3 * _filters(scale3)).to(dtype),
        (parameters.bias3 * scale3).to(dtype),
    )
    bias = (parameters.norm1_bias * scale1).to(dtype).flatten()
    return networks, Hoisted(weight.flatten(0, 1), bias)


def fold_zeros_convolution(weight: Tensor, bias: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of Glow's zero-initialised convolution, `(weight ∗ x + bias) · exp(3 logs)`, the scale folded in."""
    scale = torch.exp(LOG_SCALE * logs)
    return weight * scale[:, None, None, None], bias * scale


def _filters(scale: Tensor) -> Tensor:
    """(K, outputs) as a factor of (K, outputs, inputs, k, k)."""
    return scale[:, :, None, None, None]


def fold_mixing(bias: Tensor, logs: Tensor, weight: Tensor, transitions: int, inverse: bool, backend: str = "auto") -> Mixing:
    """The maps of the actnorms and 1×1 convolutions of a level, computed in float64.

    Args:
        bias: (T+K, C), the transition steps first.
        logs: (T+K, C).
        weight: (T+K, C, C).
        transitions: Number T of transition steps.
        inverse: Return the inverse maps and their log-det. On a GPU, where a check would make the host wait, the inverse of a
            singular weight is NaN, so that samples are reported as not finite.
        backend: Backend of the operators.

    Raises:
        ValueError: On the CPU, `inverse` with a singular weight.
    """
    mix, offset, logdets = folded(bias.double(), logs.double(), weight.double(), inverse, "1×1 convolution of step {}", backend)
    first, *others = range(transitions + 1)[::-1] if inverse else range(transitions + 1)
    composed, composed_offset = mix[first], offset[first]
    for index in others:
        composed, composed_offset = mix[index] @ composed, mix[index] @ composed_offset + offset[index]
    mix = torch.cat([composed[None], mix[transitions + 1 :]])
    offset = torch.cat([composed_offset[None], offset[transitions + 1 :]])
    dtype = compute_dtype(weight)
    return Mixing(
        mix.to(dtype).contiguous(), offset.to(dtype), logdets.sum()
    )  # in the layout that kernels read, copied once for all calls
