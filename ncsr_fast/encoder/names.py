"""Names of an RRDB network's tensors in the files of SRFlow, BasicSR, ESRGAN and ESRGAN+, and the network they make.

All names are converted to SRFlow's names, which NCSR and ESRGAN's new architecture share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ncsr_fast.checkpoints.state_dicts import Entry, StateDict, read_named
from ncsr_fast.files import CheckpointError, listed

if TYPE_CHECKING:
    from ncsr_fast.encoder.rrdb import RRDB

_FLOW_PREFIX = "RRDB."  # prefix of the names of a flow's encoder


class GeneratorState(NamedTuple):
    """The tensors of an RRDB network, and their origin."""

    tensors: dict[str, Tensor]  # by SRFlow's name
    names: dict[str, str]  # SRFlow's name → name in the file
    from_flow: bool  # True: the encoder of a flow, whose long skip starts at the last block


def read_generator(source: Mapping[str, Tensor] | str | os.PathLike) -> GeneratorState:
    """The tensors of an RRDB network, from a state dict or a file in any of the namings.

    The namings are: the RRDB files of SRFlow and NCSR and ESRGAN's new architecture (`RRDB_trunk…`), BasicSR and
    Real-ESRGAN (`body…`), ESRGAN's old architecture and ESRGAN+ (`model.…`), and the `RRDB.` part of a flow checkpoint.
    """
    return generator_state(read_named(source))


def generator_state(named: StateDict) -> GeneratorState:
    """The part of a checkpoint that is an RRDB network, under SRFlow's names."""
    state, names = named
    from_flow = any(name.startswith(_FLOW_PREFIX) for name in state)
    rename = _naming(state, from_flow)
    renamed = {name: rename(name) for name in state if not from_flow or name.startswith(_FLOW_PREFIX)}
    return GeneratorState(
        {new: state[old] for old, new in renamed.items()}, {new: names[old] for old, new in renamed.items()}, from_flow
    )


def configuration_of(state: Mapping[str, Tensor], unshuffle: int | None = None) -> dict[str, Any]:
    """The arguments of the network with this state dict (SRFlow's names), except for its long skip.

    Args:
        state: The tensors by SRFlow's names.
        unshuffle: As for `RRDB.from_pretrained`; BasicSR's ×2 and ×1 generators upsample twice.
    """
    growth, channels = _kernel(state, "RRDB_trunk.0.RDB1.conv1.weight")
    read = _kernel(state, "conv_first.weight")[1] if "conv_first.weight" in state else 3
    made = _kernel(state, "conv_last.weight")[0] if "conv_last.weight" in state else 3
    doublings = len({name.split(".")[0] for name in state if name.startswith("upconv")})
    sides = [2**doubling for doubling in range(doublings + 1)]
    if unshuffle is None:
        unshuffle = next((side for side in sides if read == made * side**2), 1)
    if unshuffle not in sides or read % unshuffle**2:
        raise ValueError(f"unshuffle={unshuffle}: the file's network reads {read} channels and upsamples ×2 {doublings} times")
    residual = any(name.endswith(".conv1x1.weight") for name in state)
    return {
        "scale": 2**doublings // unshuffle,
        "channels": channels,
        "growth": growth,
        "blocks": len({name.split(".")[1] for name in state if name.startswith("RRDB_trunk.")}),
        "unshuffle": unshuffle,
        "in_channels": read // unshuffle**2,
        "out_channels": made,
        "dense_residual": residual,
        "training_noise": "dense" if residual else "none",  # as in ESRGAN+'s training; files do not record it
    }


def _kernel(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Output and input channels of a convolution's weight."""
    if name not in state:
        raise CheckpointError(f"the checkpoint does not fit an RRDB generator: it has no {name!r}", {"missing": [name]})
    shape = tuple(state[name].shape)
    if len(shape) != 4 or 0 in shape:
        wrong = {"of the wrong shape": [f"{name} {shape}, expected that of a convolution's weight"]}
        raise CheckpointError(f"the checkpoint does not fit an RRDB generator; {listed(wrong)}", wrong)
    return shape[0], shape[1]


def encoder_layout(encoder: nn.Module) -> Iterator[Entry]:
    """Every tensor of an encoder, by SRFlow's names, in the order of its own state dict."""
    for name, tensor in encoder.state_dict().items():
        yield Entry(_from_basicsr(_to_basicsr(name)), tuple(tensor.shape), tensor)


def published_layout(encoder: RRDB) -> Iterator[tuple[str, Tensor]]:
    """The published name and the tensor, for every tensor of the network, in the order of its own state dict.

    ESRGAN+ has ESRGAN's old names, generators with a pixel unshuffle have BasicSR's, all others have SRFlow's.
    """
    for name, tensor in encoder.state_dict().items():
        name = _to_basicsr(name)
        if encoder.dense_residual:
            name = _to_old_esrgan(_from_basicsr(name), len(encoder.body), len(encoder.conv_up))
        elif encoder.unshuffle == 1:
            name = _from_basicsr(name)
        yield name, tensor


def _naming(state: Mapping[str, Tensor], from_flow: bool) -> Callable[[str], str]:
    """The function that converts the names of a state dict to SRFlow's."""
    if from_flow:
        return lambda name: name.removeprefix(_FLOW_PREFIX)
    if any(name.startswith("model.1.sub.") for name in state):
        return _from_old_esrgan(state)
    return _from_basicsr  # it leaves SRFlow's names unchanged


def _to_basicsr(name: str) -> str:
    """BasicSR's name of a tensor of `RRDB`; only the upsampling convolutions, a list counted from 0, are renamed."""
    return re.sub(r"^conv_up\.(\d+)", lambda match: f"conv_up{int(match[1]) + 1}", name)


def _from_basicsr(name: str) -> str:
    name = re.sub(r"^body\.(\d+)\.rdb(\d)", r"RRDB_trunk.\1.RDB\2", name)
    name = re.sub(r"^conv_body\b", "trunk_conv", name)
    name = re.sub(r"^conv_up(\d)", r"upconv\1", name)
    return re.sub(r"^conv_hr\b", "HRconv", name)


def _old_esrgan_layers(doublings: int) -> dict[int, str]:
    """The names of the layers after the blocks, by their number in ESRGAN's old architecture.

    That architecture numbers all layers: model.1 are the blocks, an upsampling is three layers (nearest neighbour, convolution,
    LeakyReLU), and two convolutions end the network.
    """
    end = 3 * doublings
    upsampling = {3 * number: f"upconv{number}" for number in range(1, doublings + 1)}
    return {0: "conv_first", **upsampling, end + 2: "HRconv", end + 4: "conv_last"}


def _from_old_esrgan(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    last = max(int(found[1]) for found in (re.match(r"model\.(\d+)\.", name) for name in state) if found)
    layers = _old_esrgan_layers(min((last - 4) // 3, len(state)))  # a corrupt file may have any number

    def rename(name: str) -> str:
        name = re.sub(r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", r"RRDB_trunk.\1.RDB\2.conv\3", name)
        name = re.sub(r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv1x1", r"RRDB_trunk.\1.RDB\2.conv1x1", name)
        name = re.sub(r"^model\.1\.sub\.\d+\.(weight|bias)$", r"trunk_conv.\1", name)
        return re.sub(r"^model\.(\d+)\.(weight|bias)$", lambda found: f"{layers.get(int(found[1]), found[1])}.{found[2]}", name)

    return rename


def _to_old_esrgan(name: str, blocks: int, doublings: int) -> str:
    layers = {new: f"model.{number}" for number, new in _old_esrgan_layers(doublings).items()}
    layers["trunk_conv"] = f"model.1.sub.{blocks}"
    name = re.sub(r"^RRDB_trunk\.(\d+)\.(RDB\d\.conv\d)\b", r"model.1.sub.\1.\2.0", name)
    name = re.sub(r"^RRDB_trunk\.", "model.1.sub.", name)
    return re.sub(r"^\w+", lambda found: layers.get(found[0], found[0]), name)
