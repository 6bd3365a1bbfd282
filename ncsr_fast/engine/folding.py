"""Parameters as the level uses them: every actnorm and exp-scale folded into its convolution, 1×1 convolutions composed.

All of it is differentiable PyTorch on small tensors; autograd carries the gradients to the published parameters.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ncsr_fast.ops._contract import compute_dtype
from ncsr_fast.ops.inverse_logdet import invert

LOG_SCALE = 3.0  # factor of `logs` in a zero-initialised convolution (Glow)


class Parameters(Protocol):
    """The stacked parameters of K networks: see `ncsr_fast.nn.networks.StackedNetworks`."""

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
    """K folded networks, h = w3 ∗ relu(w2 · relu(w1 ∗ z1 + pre) + b2) + b3, `pre` being the hoisted part of the first layer."""

    w1: Tensor | None  # (K, hidden, kept, 3, 3); None: the network does not see the state
    w2: Tensor  # (K, hidden, hidden, 1, 1)
    b2: Tensor  # (K, hidden)
    w3: Tensor  # (K, outputs, hidden, 3, 3)
    b3: Tensor  # (K, outputs)


class Hoisted(NamedTuple):
    """The rest of the first layers, of all K networks: pre = weight ∗ condition + bias."""

    weight: Tensor  # (K·hidden, condition, 3, 3), or its part of the level's own features where there are combinations
    bias: Tensor  # (K·hidden,)
    combinations: list[list[Tensor]] | None = None  # of the part of enlarged features: see `hoisting.combinations`


class Mixing(NamedTuple):
    """Actnorms and 1×1 convolutions of a level as K affine maps y = mix·x + offset of a pixel, in the order of encoding.

    The transition steps, which nothing separates from the first conditional one, are part of the first map.
    """

    mix: Tensor  # (K, C, C)
    offset: Tensor  # (K, C)
    logdet: Tensor  # () float64, of one pixel through all of them


def fold_networks(parameters: Parameters, kept: int, dtype: torch.dtype) -> tuple[Networks, Hoisted]:
    """Networks whose first `kept` input channels are z1 and whose others are the condition, in `dtype`."""
    scale1, scale2 = torch.exp(parameters.norm1_logs), torch.exp(parameters.norm2_logs)
    scale3 = torch.exp(LOG_SCALE * parameters.logs3)
    conv1 = (parameters.conv1 * _filters(scale1)).to(dtype)
    first, weight = conv1.split((kept, conv1.shape[2] - kept), dim=2)
    networks = Networks(
        first.contiguous() if kept else None,
        (parameters.conv2 * _filters(scale2)).to(dtype),
        (parameters.norm2_bias * scale2).to(dtype),
        (parameters.conv3 * _filters(scale3)).to(dtype),
        (parameters.bias3 * scale3).to(dtype),
    )
    return networks, Hoisted(weight.flatten(0, 1), (parameters.norm1_bias * scale1).to(dtype).flatten())


def _filters(scale: Tensor) -> Tensor:
    """(K, outputs) as a factor of (K, outputs, inputs, k, k)."""
    return scale[:, :, None, None, None]


def fold_mixing(bias: Tensor, logs: Tensor, weight: Tensor, transitions: int, inverse: bool) -> Mixing:
    """The maps of actnorms bias, logs (T+K, C) and 1×1 convolutions weight (T+K, C, C), computed in float64.

    inverse  the inverse maps and the log-det of applying them; ValueError for a singular weight on the CPU. On a GPU the
             check would make the host wait: there the inverse is NaN, and so the images are flagged as not finite.
    """
    mix, offset, logdet = _maps(bias, logs, weight, inverse)
    first, *others = range(transitions + 1)[::-1] if inverse else range(transitions + 1)
    composed, composed_offset = mix[first], offset[first]
    for index in others:
        composed, composed_offset = mix[index] @ composed, mix[index] @ composed_offset + offset[index]
    mix = torch.cat([composed[None], mix[transitions + 1 :]])
    offset = torch.cat([composed_offset[None], offset[transitions + 1 :]])
    dtype = compute_dtype(weight)
    return Mixing(mix.to(dtype).contiguous(), offset.to(dtype), logdet)  # as kernels read it, copied once for all calls


def _maps(bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mix (N, C, C) and offset (N, C) of every map, and the log-det () of a pixel through all, in float64."""
    bias, logs, weight = bias.double(), logs.double(), weight.double()
    inverses, logdets = invert(weight, "1×1 convolution of step {}", needs_inverse=inverse)
    logdet = logs.sum() + logdets.sum()
    if inverse:
        return torch.exp(-logs)[:, :, None] * inverses, -bias, -logdet
    mix = weight * torch.exp(logs)[:, None, :]
    return mix, (mix @ bias[:, :, None])[:, :, 0], logdet
