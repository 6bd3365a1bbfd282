"""The networks of a level's branches; one module has the stacked networks of all steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.engine.folding import fold_zeros_convolution
from ncsr_fast.flow.actnorm import initialize_actnorm
from ncsr_fast.ops.conv3x3 import convolution

WEIGHT_STD = 0.05  # standard deviation of the initial weights of the first two convolutions


class Network(NamedTuple):
    """The tensors of one network: views of a `StackedNetworks`."""

    conv1: Tensor  # (hidden, inputs, 3, 3)
    norm1_bias: Tensor  # (hidden,)
    norm1_logs: Tensor  # (hidden,)
    conv2: Tensor  # (hidden, hidden, 1, 1)
    norm2_bias: Tensor  # (hidden,)
    norm2_logs: Tensor  # (hidden,)
    conv3: Tensor  # (outputs, hidden, 3, 3)
    bias3: Tensor  # (outputs,)
    logs3: Tensor  # (outputs,)

    def __call__(self, x: Tensor, initialize: bool = False) -> Tensor:
        """The output (B, outputs, H, W) for x (B, inputs, H, W); `initialize` first sets the two actnorms from x."""
        x = _conv_actnorm_relu(x, self.conv1, self.norm1_bias, self.norm1_logs, initialize)
        x = _conv_actnorm_relu(x, self.conv2, self.norm2_bias, self.norm2_logs, initialize)
        return zeros_conv(x, self.conv3, self.bias3, self.logs3)


class StackedNetworks(nn.Module):
    """`count` networks of one shape, every parameter with a leading dimension of `count`.

    Each is conv3×3 → actnorm → ReLU → conv1×1 → actnorm → ReLU → (conv3×3 + bias) · exp(3 logs), the first
    two convolutions without bias. The last convolution is initialised to zero, so that every coupling is nearly the
    identity at first. Parameters are stacked so that folding, the hoisted convolution and an optimizer step are one
    operation each for all steps. No output depends on a pixel farther than `radius`.
    """

    radius = 2  # two 3×3 convolutions
    residual = 0

    def __init__(self, count: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(count, *shape))

        self.conv1 = nn.Parameter(torch.randn(count, hidden, inputs, 3, 3) * WEIGHT_STD)
        self.norm1_bias, self.norm1_logs = zeros(hidden), zeros(hidden)
        self.conv2 = nn.Parameter(torch.randn(count, hidden, hidden, 1, 1) * WEIGHT_STD)
        self.norm2_bias, self.norm2_logs = zeros(hidden), zeros(hidden)
        self.conv3 = zeros(outputs, hidden, 3, 3)
        self.bias3, self.logs3 = zeros(outputs), zeros(outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply `to()`, `half()`, `share_memory()` … to the weights as 4-D weights of single networks.

        Unlike stacked weights, 4-D weights can have the memory format `torch.channels_last`.
        """
        return super()._apply(lambda tensor: _apply_single(fn, tensor), recurse)  # type: ignore[no-untyped-call]

    def unbind(self) -> list[Network]:
        """The networks one by one; call it once per pass, because indexing under autograd fills a stack of zeros per step."""
        return [Network(*tensors) for tensors in zip(*(getattr(self, name).unbind() for name in Network._fields))]


class DeepNetwork(NamedTuple):
    """The tensors of one network: views of a `DeepNetworks`."""

    conv1: Tensor  # (hidden, inputs, 3, 3)
    bias1: Tensor  # (hidden,)
    conv2: Tensor  # (layers, hidden, hidden, 3, 3)
    bias2: Tensor  # (layers, hidden)
    conv3: Tensor  # (outputs, hidden, 3, 3)
    bias3: Tensor  # (outputs,)
    logs3: Tensor  # (outputs,)
    residual: int  # layers inside a residual; 0: none

    def __call__(self, x: Tensor, initialize: bool = False) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W); there is nothing to `initialize`."""
        x = start = F.relu(convolution(x, self.conv1, self.bias1, None))
        for index, (weight, bias) in enumerate(zip(self.conv2.unbind(), self.bias2.unbind()), start=1):
            x = F.relu(convolution(x, weight, bias, None))
            if self.residual and index % self.residual == 0:
                x = start = start + x
        return zeros_conv(x, self.conv3, self.bias3, self.logs3)


class DeepNetworks(nn.Module):
    """`count` networks of SRFlow-DA (Jo et al. 2021), every parameter with a leading dimension of `count`.

    Each is conv3×3 → ReLU, then `layers` times conv3×3 → ReLU, then (conv3×3 + bias) · exp(3 logs), all with biases and none
    with an actnorm. The last one starts at zero.

    Args:
        count: Of networks.
        inputs: Channels read.
        hidden: Channels of all layers between.
        outputs: Channels of the output.
        layers: Hidden layers behind the first.
        residual: Of so many of them at a time the input is added to the output; 0: to none.
    """

    def __init__(self, count: int, inputs: int, hidden: int, outputs: int, *, layers: int, residual: int = 0) -> None:
        super().__init__()
        self.layers, self.residual = layers, residual
        self.radius = 2 + layers  # as many 3×3 convolutions

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(count, *shape))

        self.conv1 = nn.Parameter(torch.randn(count, hidden, inputs, 3, 3) * WEIGHT_STD)
        self.bias1 = zeros(hidden)
        self.conv2 = nn.Parameter(torch.randn(count, layers, hidden, hidden, 3, 3) * WEIGHT_STD)
        self.bias2 = zeros(layers, hidden)
        self.conv3 = zeros(outputs, hidden, 3, 3)
        self.bias3, self.logs3 = zeros(outputs), zeros(outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As `StackedNetworks` has it."""
        return super()._apply(lambda tensor: _apply_single(fn, tensor), recurse)  # type: ignore[no-untyped-call]

    def unbind(self) -> list[DeepNetwork]:
        """The networks one by one."""
        tensors = (getattr(self, name).unbind() for name in DeepNetwork._fields[:-1])
        return [DeepNetwork._make((*own, self.residual)) for own in zip(*tensors)]


def _apply_single(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    if tensor.dim() < 5:
        return fn(tensor)
    applied: Tensor = fn(tensor.flatten(0, -4)).unflatten(0, tensor.shape[:-3])
    return applied


def zeros_conv(x: Tensor, weight: Tensor, bias: Tensor, logs: Tensor) -> Tensor:
    """Glow's zero-initialised 3×3 convolution: `(weight ∗ x + bias) · exp(3 logs)` for each output channel."""
    return convolution(x, *fold_zeros_convolution(weight, bias, logs), None)


def _conv_actnorm_relu(x: Tensor, weight: Tensor, bias: Tensor, logs: Tensor, initialize: bool) -> Tensor:
    """relu((weight ∗ x + bias) · exp(logs)), the actnorm folded into the convolution."""
    if initialize:
        initialize_actnorm(bias, logs, convolution(x, weight, None, None))
    scale = torch.exp(logs)
    return F.relu(convolution(x, weight * scale[:, None, None, None], bias * scale, None))


# By kind: a module (count, inputs, hidden, outputs) whose `unbind` returns the networks one by one, each a function of
# (x, initialize); its `radius`, without which a level cannot be tiled, is how far in pixels an output depends on the input.
# The engine knows StackedNetworks and DeepNetworks; a level with another kind runs by its definition.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "glow": StackedNetworks,
    "deep": partial(DeepNetworks, layers=4),
    "deep-residual": partial(DeepNetworks, layers=4, residual=4),
    "deeper-residual": partial(DeepNetworks, layers=36, residual=2),
}
