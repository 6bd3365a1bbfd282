"""Folding of parameters: actnorms and scales merged into the convolutions beside them, 1×1 convolutions composed.

Folding is differentiable: autograd carries the gradients to the parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ncsr_fast.ops.contract import compute_dtype
from ncsr_fast.ops.fold import folded
from ncsr_fast.ops.fold_filters import Filters, folded_filters
from ncsr_fast.ops.step_network import StepNetwork

LOG_SCALE = 3.0  # factor of `logs` in a zero-initialised convolution (Glow)


class NetworkParameters(Protocol):
    """The stacked parameters of K networks: see `ncsr_fast.flow.networks`, as for both kinds."""

    conv1: Tensor
    conv2: Tensor
    conv3: Tensor
    bias3: Tensor
    logs3: Tensor
    residual: int


class GlowParameters(NetworkParameters, Protocol):
    """Those of `StackedNetworks`."""

    norm1_bias: Tensor
    norm1_logs: Tensor
    norm2_bias: Tensor
    norm2_logs: Tensor


class DeepParameters(NetworkParameters, Protocol):
    """Those of `DeepNetworks`."""

    bias1: Tensor
    bias2: Tensor


class Networks(NamedTuple):
    """K folded networks, their `StepNetwork` weights stacked along a leading dimension.

    Of deep networks, those of n hidden layers of 3×3, w2 is (K, n, hidden, hidden, 3, 3) and b2 (K, n, hidden).
    """

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
    fold = _fold_deep if is_deep(parameters.conv2) else _fold_glow
    conv1, bias1, conv2, bias2 = (tensor.to(dtype) for tensor in fold(parameters))
    w1, weight = conv1.split((state_channels, conv1.shape[2] - state_channels), dim=2)
    scale3 = torch.exp(LOG_SCALE * parameters.logs3)
    conv3, bias3 = (parameters.conv3 * _filters(scale3)).to(dtype), (parameters.bias3 * scale3).to(dtype)
    networks = Networks(w1.contiguous() if state_channels else None, conv2, bias2, conv3, bias3)
    return networks, Hoisted(weight.flatten(0, 1), bias1.flatten())


def is_deep(w2: Tensor) -> bool:
    """True for the stacked weights of the hidden layers of deep networks."""
    return w2.dim() == 6


def _fold_glow(parameters: NetworkParameters) -> tuple[Tensor, ...]:
    """The first two layers, weights and biases, with the actnorms behind them."""
    given = cast(GlowParameters, parameters)
    scale1, scale2 = torch.exp(given.norm1_logs), torch.exp(given.norm2_logs)
    return given.conv1 * _filters(scale1), given.norm1_bias * scale1, given.conv2 * _filters(scale2), given.norm2_bias * scale2


def _fold_deep(parameters: NetworkParameters) -> tuple[Tensor, ...]:
    """The first layer and the hidden ones behind it, which have nothing to fold.

    As views: where autograd records nothing, what is made of parameters wants no gradients, and a parameter itself would.
    """
    given = cast(DeepParameters, parameters)
    return tuple(tensor.view_as(tensor) for tensor in (given.conv1, given.bias1, given.conv2, given.bias2))


def fold_level(
    stacks: Sequence[tuple[NetworkParameters, int]], dtype: torch.dtype, backend: str
) -> list[tuple[Networks, Hoisted]]:
    """`fold_networks` of several stacks of networks, each with its number of state channels, by one launch of a backend."""
    if backend == "reference" or any(is_deep(parameters.conv2) for parameters, _ in stacks):
        return [fold_networks(parameters, state_channels, dtype) for parameters, state_channels in stacks]
    filters: list[Filters] = []
    for parameters, state_channels in stacks:
        p = cast(GlowParameters, parameters)
        filters.append(Filters(p.conv1, p.norm1_bias, p.norm1_logs, 1.0, state_channels))
        filters.append(Filters(p.conv2, p.norm2_bias, p.norm2_logs, 1.0, p.conv2.shape[2]))
        filters.append(Filters(p.conv3, p.bias3, p.logs3, LOG_SCALE, p.conv3.shape[2]))
    folded = iter(folded_filters(filters, dtype, backend))
    found = []
    for _, state_channels in stacks:
        (w1, weight, bias), (w2, _, b2), (w3, _, b3) = next(folded), next(folded), next(folded)
        networks = Networks(w1 if state_channels else None, w2, b2, w3, b3)
        found.append((networks, Hoisted(weight.flatten(0, 1), bias.flatten())))
    return found


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
    mixes, offsets = list(mix.unbind()), list(offset.unbind())  # indexing would have a gradient of zeros for each map
    first, *others = range(transitions + 1)[::-1] if inverse else range(transitions + 1)
    composed, composed_offset = mixes[first], offsets[first]
    for index in others:
        composed, composed_offset = mixes[index] @ composed, mixes[index] @ composed_offset + offsets[index]
    mix = torch.stack([composed, *mixes[transitions + 1 :]])
    offset = torch.stack([composed_offset, *offsets[transitions + 1 :]])
    dtype = compute_dtype(weight)
    return Mixing(
        mix.to(dtype).contiguous(), offset.to(dtype), logdets.sum()
    )  # in the layout that kernels read, copied once for all calls
