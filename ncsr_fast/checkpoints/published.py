"""The state dicts of the published programs, and ours, in both directions.

The published programs keep one module per flow step in one flat list (`flowUpsamplerNet.layers.N`, squeezes
and splits included); ours stack the steps of a level. `layout` is the one table that relates the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ncsr_fast.checkpoints.recognition import likeness
from ncsr_fast.checkpoints.state_dicts import Entry
from ncsr_fast.files import CheckpointError, differences, listed
from ncsr_fast.flow.networks import DeepNetworks, StackedNetworks

if TYPE_CHECKING:
    from ncsr_fast.config import NCSRConfig
    from ncsr_fast.flow.level import FlowLevel
    from ncsr_fast.model import NCSR

_LLFLOW_WIDTH = 64  # that its program takes for granted


def layout(model: NCSR) -> Iterator[Entry]:
    """The entries of the published state dict of `model`, in order; their tensors are views of the parameters."""
    for entry in model.encoder.layout():
        yield entry._replace(name=f"RRDB.{entry.name}")
    yield from flow_layout(model, "flowUpsamplerNet.")
    config = model.config
    outputs = config.traits.unused_outputs
    yield Entry("flowUpsamplerNet.f.0.weight", (outputs, _unused_inputs(config), 3, 3), None)
    yield Entry("flowUpsamplerNet.f.0.bias", (outputs,), None)


def flow_layout(model: NCSR, prefix: str) -> Iterator[Entry]:
    """The entries of the levels of `model`, whose names begin with `prefix`."""
    position = 0
    for level in model.levels:
        position += level.squeeze > 1  # the squeeze
        for index in range(level.transition_steps + level.steps):
            yield from _step(f"{prefix}layers.{position}", model, level, index)
            position += 1
        if level.split_channels:
            split = f"{prefix}layers.{position}.conv"
            position += 1
            yield _whole(f"{split}.weight", level.split_weight.detach())
            yield _whole(f"{split}.bias", level.split_bias.detach())
            yield _scale(f"{split}.logs", level.split_logs.detach())


def _unused_inputs(config: NCSRConfig) -> int:
    """Inputs of the convolution that no computation reads; of LLFlow they do not follow the width of the encoder."""
    return _LLFLOW_WIDTH * (1 + len(config.stacked_blocks)) if config.system == "llflow" else config.condition_channels


def _step(prefix: str, model: NCSR, level: FlowLevel, index: int) -> Iterator[Entry]:
    """The tensors of one step of a level, counted with the transition steps."""
    yield _channelwise(f"{prefix}.actnorm.bias", level.actnorm_bias.detach()[index])
    yield _channelwise(f"{prefix}.actnorm.logs", level.actnorm_logs.detach()[index])
    yield _whole(f"{prefix}.invconv.weight", level.invconv.detach()[index])
    step = index - level.transition_steps
    if step < 0:
        return
    yield from _network(f"{prefix}.affine.fAffine", level.couplings, step)
    yield from _network(f"{prefix}.affine.fFeatures", level.injectors, step)
    if not model.config.noise_channels:
        return
    # the published network exists in every step, used or not
    used = next((branch.steps for branch in level.branches if branch.name == "noise_couplings"), 0)
    noise_step = step - (level.steps - used)
    if noise_step >= 0:
        yield from _network(f"{prefix}.affine.fAffine_std", level.noise_couplings, noise_step)
        return
    inputs, outputs = level.pass_through + model.config.noise_channels, 2 * (level.channels - level.pass_through)
    with torch.device("meta"):  # shapes alone
        unused = StackedNetworks(1, inputs, model.config.hidden_channels, outputs)
    for entry in _network(f"{prefix}.affine.fAffine_std", unused, 0):
        yield entry._replace(tensor=None)


def load_network(model: NCSR, state: Mapping[str, Tensor]) -> None:
    """Copy a published state dict into `model`; if any tensor does not fit, raise CheckpointError and change nothing."""
    entries = list(layout(model))
    expected = {entry.name: entry.shape for entry in entries}
    problems = differences(expected, state)
    if problems:
        found = likeness({name: tensor.shape for name, tensor in state.items()})
        hint = "" if found == likeness(expected) else f", but looks like that of {found}"
        raise CheckpointError(
            f"the checkpoint does not fit this model ({model.describe()}){hint}; {listed(problems)}", problems
        )
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
    for name, networks in model.named_modules():
        if isinstance(networks, DeepNetworks):
            for leaf in ("conv2", "bias2"):
                for index, layers in enumerate(getattr(networks, leaf)):
                    parts = enumerate(layers)
                    found |= {(p.data_ptr(), p.shape): f"{name}.{leaf}[{index}][{layer}]" for layer, p in parts}

    def place(tensor: Tensor) -> str:
        return found[tensor.data_ptr(), tensor.shape]

    return {entry.name: None if entry.tensor is None else place(entry.tensor) for entry in layout(model)}


def _whole(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor)


def _channelwise(name: str, tensor: Tensor) -> Entry:
    return Entry(name, (1, tensor.shape[0], 1, 1), tensor)


def _scale(name: str, tensor: Tensor) -> Entry:
    return Entry(name, (tensor.shape[0], 1, 1), tensor)


def _network(prefix: str, networks: StackedNetworks | DeepNetworks, index: int) -> Iterator[Entry]:
    def part(name: str) -> Tensor:
        return getattr(networks, name).detach()[index]

    if isinstance(networks, DeepNetworks):
        first, *hidden, last = _deep_layers(prefix, networks)
        convolutions = [(first, part("conv1"), part("bias1")), *zip(hidden, part("conv2"), part("bias2"))]
        for name, weight, bias in convolutions:
            yield _whole(f"{name}.weight", weight)
            yield _whole(f"{name}.bias", bias)
    else:
        last = f"{prefix}.4"
        for layer, conv, norm in ((0, "conv1", "norm1"), (2, "conv2", "norm2")):
            yield _whole(f"{prefix}.{layer}.weight", part(conv))
            yield _channelwise(f"{prefix}.{layer}.actnorm.bias", part(f"{norm}_bias"))
            yield _channelwise(f"{prefix}.{layer}.actnorm.logs", part(f"{norm}_logs"))
    yield _whole(f"{last}.weight", part("conv3"))
    yield _whole(f"{last}.bias", part("bias3"))
    yield _scale(f"{last}.logs", part("logs3"))


def _deep_layers(prefix: str, networks: DeepNetworks) -> list[str]:
    """The names of the convolutions of SRFlow-DA's networks, first to last: a ReLU between any two counts as well."""
    count, residual = networks.layers, networks.residual
    if not residual:
        return [f"{prefix}.{2 * index}" for index in range(count + 2)]
    groups = [""] if count == residual else [f"{group}." for group in range(count // residual)]
    return [f"{prefix}1.0", *(f"{prefix}2.{group}{2 * index}" for group in groups for index in range(residual)), f"{prefix}3.0"]
