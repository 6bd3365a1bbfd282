"""The state dicts of the published NCSR, SRFlow, RRDB and ESRGAN programs, and ours, in both directions.

The published programs keep one module per flow step in one flat list (`flowUpsamplerNet.layers.N`, squeezes
and splits included); ours stack the steps of a level. `layout` is the one table that relates the two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.files import CheckpointError, compare
from ncsr_fast.nn.networks import StackedNetworks
from ncsr_fast.nn.state_dicts import StateDict, read_named

if TYPE_CHECKING:
    from ncsr_fast.nn.encoder import RRDB
    from ncsr_fast.nn.ncsr import NCSR


class Entry(NamedTuple):
    """One published tensor: its name and shape, and the tensor of ours that it is (None: no computation uses it)."""

    name: str
    shape: tuple[int, ...]
    tensor: Tensor | None


# -- the flow ----------------------------------------------------------------------------------------------------


def layout(model: NCSR) -> Iterator[Entry]:
    """Every tensor of the published state dict of `model`, in its order; the tensors are views of the parameters."""
    for name, tensor in encoder_layout(model.encoder):
        yield Entry("RRDB." + name, tuple(tensor.shape), tensor)
    config = model.config
    position = 0
    for level in model.levels:
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
            noise_step = step - (level.steps - level.noise_steps)
            if noise_step >= 0:
                yield from _network(f"{prefix}.affine.fAffine_std", level.noise_couplings, noise_step)
            else:
                with torch.device("meta"):  # shapes alone
                    unused = StackedNetworks(
                        1, level.kept + config.noise_channels, config.hidden_channels, 2 * (level.channels - level.kept)
                    )
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
    """Copy a published state dict into `model`; strict, and nothing is changed when it does not fit."""
    entries = list(layout(model))
    compare({entry.name: entry.shape for entry in entries}, state, f"this model ({model.describe()})")
    for entry in entries:
        if entry.tensor is not None:
            entry.tensor.copy_(state[entry.name].reshape(entry.tensor.shape))
    model.unused_published = {e.name: state[e.name].detach().cpu().clone() for e in entries if e.tensor is None}
    model.actnorm_initialized.fill_(any(bool(level.actnorm_bias.detach().any()) for level in model.levels))


def network_state_dict(model: NCSR) -> dict[str, Tensor]:
    """The published state dict of `model`: copies, with the published shapes."""
    like = next(model.parameters())
    state = {}
    for entry in layout(model):
        tensor = model.unused_published.get(entry.name) if entry.tensor is None else entry.tensor
        state[entry.name] = like.new_zeros(entry.shape) if tensor is None else tensor.reshape(entry.shape).to(like).clone()
    return state


def places(model: NCSR) -> dict[str, str | None]:
    """For every published name, the tensor of ours that it is, as in "levels.0.invconv[3]"; None: no computation uses it."""
    parameters = {value.untyped_storage().data_ptr(): (name, value) for name, value in model.named_parameters()}

    def place(tensor: Tensor) -> str:
        name, parameter = parameters[tensor.untyped_storage().data_ptr()]
        if tensor.numel() == parameter.numel() and tensor.dim() == parameter.dim():
            return name
        return f"{name}[{tensor.storage_offset() // parameter.stride(0)}]"

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


# -- the encoder -------------------------------------------------------------------------------------------------


def encoder_layout(encoder: RRDB) -> Iterator[tuple[str, Tensor]]:
    """(name in the published RRDB, SRFlow and NCSR files, tensor) of every tensor of the encoder, in order."""
    for name, tensor in encoder.state_dict().items():
        # ours are BasicSR's names, but for the upsampling convolutions, which are a list counted from 0
        yield _from_basicsr(re.sub(r"^conv_up\.(\d+)", lambda match: f"conv_up{int(match[1]) + 1}", name)), tensor


def read_encoder_state_dict(source: Mapping[str, Tensor] | str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of an RRDB generator, from a state dict or a file in any of the namings, under those of SRFlow.

    The namings are: the RRDB files of SRFlow and NCSR and ESRGAN's new architecture (`RRDB_trunk…`), BasicSR and
    Real-ESRGAN (`body…`), ESRGAN's old architecture (`model.…`), and the `RRDB.` part of a flow checkpoint.
    """
    return read_named_encoder(source).tensors


def read_named_encoder(source: Mapping[str, Tensor] | str | os.PathLike) -> StateDict:
    """The same, with the names the tensors had."""
    state, names = read_named(source)
    rename = _encoder_naming(state)
    renamed = {name: rename(name) for name in state if not _is_flow(state) or name.startswith("RRDB.")}
    return StateDict({new: state[old] for old, new in renamed.items()}, {new: names[old] for old, new in renamed.items()})


def _is_flow(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("RRDB.") for name in state)


def _encoder_naming(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """What makes SRFlow's names of those of this generator, or of the flow that it is part of."""
    if _is_flow(state):
        return lambda name: name.removeprefix("RRDB.")
    if any(name.startswith("model.1.sub.") for name in state):
        return _from_old_esrgan(state)
    return _from_basicsr  # SRFlow's names are left as they are


def encoder_configuration(state: Mapping[str, Tensor]) -> dict[str, int]:
    """scale, channels, growth and blocks of the generator that has this state dict (SRFlow's names)."""
    try:
        growth, channels = state["RRDB_trunk.0.RDB1.conv1.weight"].shape[:2]
    except KeyError as error:
        raise CheckpointError(f"the checkpoint is not that of an RRDB generator: it has no {error}") from error
    blocks = {name.split(".")[1] for name in state if name.startswith("RRDB_trunk.")}
    doublings = {name.split(".")[0] for name in state if name.startswith("upconv")}
    return {"scale": 2 ** len(doublings), "channels": channels, "growth": growth, "blocks": len(blocks)}


def load_encoder(encoder: RRDB, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict under SRFlow's names into `encoder`; strict, and nothing is changed when it does not fit."""
    entries = dict(encoder_layout(encoder))
    expected = {name: tuple(tensor.shape) for name, tensor in entries.items()}
    compare(expected, state, f"this encoder ({encoder.describe()})")
    for name, tensor in entries.items():
        tensor.copy_(state[name])


def _from_basicsr(name: str) -> str:
    name = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", name)
    name = re.sub(r"^conv_body\b", "trunk_conv", name)
    name = re.sub(r"^conv_up(\d)", r"upconv\1", name)
    return re.sub(r"^conv_hr\b", "HRconv", name)


def _from_old_esrgan(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """ESRGAN's old architecture numbers all layers: model.1 are the blocks, two convolutions end the network."""
    last = max(int(found[1]) for found in (re.match(r"model\.(\d+)\.", name) for name in state) if found)
    doublings = (last - 4) // 3  # each is three layers: nearest neighbour, convolution, LeakyReLU
    layers = {0: "conv_first", **{3 * n: f"upconv{n}" for n in range(1, doublings + 1)}, last - 2: "HRconv", last: "conv_last"}

    def rename(name: str) -> str:
        name = re.sub(r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", r"RRDB_trunk.\1.RDB\2.conv\3", name)
        name = re.sub(r"^model\.1\.sub\.\d+\.(weight|bias)$", r"trunk_conv.\1", name)
        return re.sub(r"^model\.(\d+)\.(weight|bias)$", lambda found: f"{layers.get(int(found[1]), found[1])}.{found[2]}", name)

    return rename
