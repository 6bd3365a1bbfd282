"""The networks of a level's branches; one module has the stacked networks of all steps."""

from __future__ import annotations

from collections.abc import Callable
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

    Each network is conv3×3 → actnorm → ReLU → conv1×1 → actnorm → ReLU → (conv3×3 + bias) · exp(3 logs), the first
    two convolutions without bias. The last convolution is initialised to zero, so that every coupling is nearly the
    identity at first. Parameters are stacked so that folding, the hoisted convolution and an optimizer step are one
    operation each for all steps.
    """

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


def _apply_single(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    if tensor.dim() != 5:
        return fn(tensor)
    applied: Tensor = fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])
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


# By kind: a module class (count, inputs, hidden, outputs) whose `unbind` returns the networks one by one, each a function of
# (x, initialize). The engine has kernels for StackedNetworks; a level with another kind runs by the reference.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"glow": StackedNetworks}
