"""Conversion between state dicts of the published NCSR and SRFlow programs and of this package.

The published programs have one module per flow step in one flat list (`flowUpsamplerNet.layers.N`, squeezes
and splits included); this package stacks the steps of a level. `layout` is the one table that relates the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.encoder.names import encoder_layout
from ncsr_fast.files import compare
from ncsr_fast.flow.networks import StackedNetworks

if TYPE_CHECKING:
    from ncsr_fast.model import NCSR


class Entry(NamedTuple):
    """One published tensor: its name and shape, and the model's tensor (None: no computation uses it)."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor | None


def layout(model: NCSR) -> Iterator[Entry]:
    """The entries of the published state dict of `model`, in order; their tensors are views of the parameters."""
    for name, tensor in encoder_layout(model.encoder):
        yield Entry("RRDB." + name, tuple(tensor.shape), tensor)
    config = model.config
    position = 0
    for number, level in enumerate(model.levels):
        position += 1  # the squeeze
        for index in range(config.transition_steps + config.steps):
            prefix = f"flowUpsamplerNet.layers.{position}"
            position += 1
            yield _channelwise(f"{prefix}.actnorm.bias", level.actnorm_bias.detach()[index])
            yield _channelwise(f"{prefix}.actnorm.logs", level.actnorm_logs.detach()[index])
            yield _whole(f"{prefix}.invconv.weight", level.invconv.detach()[index])
            step = index - config.transition_steps
            if step < 0:
                continue
            yield from _network(f"{prefix}.affine.fAffine", level.couplings, step)
            yield from _network(f"{prefix}.affine.fFeatures", level.injectors, step)
            if not config.noise_channels:
                continue
            # the published network exists in every step, used or not
            noise_step = step - (config.steps - config.noise_steps[number])
            if noise_step >= 0:
                yield from _network(f"{prefix}.affine.fAffine_std", level.noise_couplings, noise_step)
            else:
                inputs, outputs = level.pass_through + config.noise_channels, 2 * (level.channels - level.pass_through)
                with torch.device("meta"):  # shapes alone
                    unused = StackedNetworks(1, inputs, config.hidden_channels, outputs)
                for entry in _network(f"{prefix}.affine.fAffine_std", unused, 0):
                    yield entry._replace(tensor=None)
        if level.split_channels:
            prefix = f"flowUpsamplerNet.layers.{position}.conv"
            position += 1
            yield _whole(f"{prefix}.weight", level.split_weight.detach())
            yield _whole(f"{prefix}.bias", level.split_bias.detach())
            yield _scale(f"{prefix}.logs", level.split_logs.detach())
    yield Entry("flowUpsamplerNet.f.0.weight", (96, config.condition_channels, 3, 3), None)
    yield Entry("flowUpsamplerNet.f.0.bias", (96,), None)


def load_network(model: NCSR, state: Mapping[str, Tensor]) -> None:
    """Copy a published state dict into `model`; if any tensor does not fit, raise CheckpointError and change nothing."""
    entries = list(layout(model))
    compare({entry.name: entry.shape for entry in entries}, state, f"this model ({model.describe()})")
    for entry in entries:
        if entry.tensor is not None:
            entry.tensor.copy_(state[entry.name].reshape(entry.tensor.shape))
    model.unused_published = {e.name: state[e.name].detach().cpu().clone() for e in entries if e.tensor is None}
    model.actnorm_initialized.fill_(any(bool(level.actnorm_bias.detach().any()) for level in model.levels))


def network_state_dict(model: NCSR) -> dict[str, Tensor]:
    """The published state dict of `model`, as copies with the published shapes."""
    like = next(model.parameters())
    state = {}
    for entry in layout(model):
        tensor = model.unused_published.get(entry.name) if entry.tensor is None else entry.tensor
        state[entry.name] = like.new_zeros(entry.shape) if tensor is None else tensor.reshape(entry.shape).to(like).clone()
    return state


def places(model: NCSR) -> dict[str, str | None]:
    """The model's tensor for every published name, such as "levels.0.invconv[3]"; None: no computation uses it."""
    found = {}
    for name, parameter in model.named_parameters():
        found[parameter.data_ptr(), parameter.shape] = name
        found |= {(part.data_ptr(), part.shape): f"{name}[{index}]" for index, part in enumerate(parameter)}

    def place(tensor: Tensor) -> str:
        return found[tensor.data_ptr(), tensor.shape]

    return {entry.name: None if entry.tensor is None else place(entry.tensor) for entry in layout(model)}


def _whole(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor)


def _channelwise(name: str, tensor: Tensor) -> Entry:
    return Entry(name, (1, tensor.shape[0], 1, 1), tensor)


def _scale(name: str, tensor: Tensor) -> Entry:
    return Entry(name, (tensor.shape[0], 1, 1), tensor)


def _network(prefix: str, networks: StackedNetworks, index: int) -> Iterator[Entry]:
    def part(name: str) -> Tensor:
        return getattr(networks, name).detach()[index]

    for layer, conv, norm in ((0, "conv1", "norm1"), (2, "conv2", "norm2")):
        yield _whole(f"{prefix}.{layer}.weight", part(conv))
        yield _channelwise(f"{prefix}.{layer}.actnorm.bias", part(f"{norm}_bias"))
        yield _channelwise(f"{prefix}.{layer}.actnorm.logs", part(f"{norm}_logs"))
    yield _whole(f"{prefix}.4.weight", part("conv3"))
    yield _whole(f"{prefix}.4.bias", part("bias3"))
    yield _scale(f"{prefix}.4.logs", part("logs3"))
