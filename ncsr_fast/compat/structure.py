"""Recognition of networks of the published programs by module tree, parameters and attributes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ncsr_fast.checkpoints.published import Entry, flow_layout, layout
from ncsr_fast.compat.calls import call_of
from ncsr_fast.compat.replacement import Unsupported, expect
from ncsr_fast.config import FlowConfig, NCSRConfig
from ncsr_fast.encoder.blocks import SLOPE
from ncsr_fast.engine.folding import LOG_SCALE
from ncsr_fast.model import NCSR


def resembles_network(module: nn.Module) -> bool:
    """True if the module has the parts of a published network."""
    layers = getattr(getattr(module, "flowUpsamplerNet", None), "layers", None)
    return isinstance(getattr(module, "RRDB", None), nn.Module) and isinstance(layers, nn.ModuleList)


def recognise(net: nn.Module) -> NCSRConfig:
    """The configuration of a published network; raise Unsupported with the reason if it cannot be served.

    The options that the network was built with give the architecture. Everything visible is compared with it: the names and
    shapes of all parameters, the attributes of the layers, the arguments of `forward`.
    """
    config = configuration_of(net)
    names, arguments = call_of(config).names(), list(inspect.signature(type(net).forward).parameters)[1:]
    if arguments != names:
        raise Unsupported(f"its forward takes ({', '.join(arguments)}) instead of ({', '.join(names)})")
    config = replace(config, noise_steps=_noise_steps(net, config))
    compare_parameters(net, config)
    served_attributes(net, config)
    return config


def configuration_of(net: nn.Module) -> NCSRConfig:
    """The configuration that the network's options describe, with the noise steps found in its layers."""
    if not isinstance(getattr(net, "opt", None), Mapping):
        raise Unsupported("it has no options `opt`, which describe the architecture")
    for name in ("RRDB", "flowUpsamplerNet"):
        if getattr(getattr(net, name), "opt", net.opt) != net.opt:
            raise Unsupported(f"the options {name}.opt are not those of the network")
    try:
        config = NCSRConfig.from_published(net.opt)
    except (ValueError, TypeError) as error:
        raise Unsupported(f"option {error}") from error
    return replace(config, system="ncsr") if config.system == "fs-ncsr" else config  # their networks are the same


def _noise_steps(net: nn.Module, config: NCSRConfig) -> tuple[int, ...]:
    """For each level, the number of its last steps that use their noise coupling."""
    if not config.noise_channels:
        return ()
    conditional = (layer for layer in net.flowUpsamplerNet.layers if hasattr(layer, "affine"))
    counts = []
    for level in range(config.levels):
        used = [bool(getattr(layer.affine, "stdmode", False)) for layer in islice(conditional, config.steps)]
        if used != sorted(used):
            raise Unsupported(f"in level {level + 1} the steps with a noise coupling are not the last steps")
        counts.append(sum(used))
    return tuple(counts)


def compare_parameters(net: nn.Module, config: NCSRConfig | FlowConfig, left_out: str = "") -> None:
    """Raise Unsupported unless the parameters are those of a network of this configuration, with no buffers.

    Args:
        net: The network.
        config: Of a whole network, or of its flow.
        left_out: The child of the network whose parameters no computation reads.
    """
    expected = {entry.name: entry.shape for entry in entries_of(skeleton_of(config))}
    parameters = ((name, parameter) for name, parameter in net.named_parameters() if name.split(".")[0] != left_out)
    found = {name: tuple(parameter.shape) for name, parameter in parameters}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise Unsupported(
                f"parameter {name} has shape {found.get(name, 'none: it is missing')}, "
                f"expected {expected.get(name, 'none: it is unknown')}"
            )
    if any(True for _ in net.buffers()):
        raise Unsupported("it has buffers, but published networks have none")


def served_attributes(net: nn.Module, config: NCSRConfig) -> dict[str, dict[str, Any]]:
    """For every layer, by name, the attributes that its own code reads, with the values that are served."""
    first = [config.steps - count for count in config.noise_steps]  # the first steps that use their noise coupling
    used = iter([bool(config.noise_channels) and k >= start for start in first for k in range(config.steps)])
    found = {"RRDB": {"gray_map_bool": False, "concat_color_map": False}}
    found |= flow_attributes(net.flowUpsamplerNet, config.flow, "flowUpsamplerNet")
    for name in [name for name in found if name.endswith(".affine")]:
        found[name] |= {"stdmode": next(used), "model_name": config.traits.title}
    found |= {f"RRDB.{name}": layer_attributes(module) for name, module in net.RRDB.named_modules() if name}
    return present_attributes(net, found)


def flow_attributes(flow: nn.Module, config: FlowConfig, name: str) -> dict[str, dict[str, Any]]:
    """The same for the layers of a flow, by the flow's name and theirs."""
    # sizes and names by which layers find their features are served as they are
    sizes = {key: copy.copy(value) for key, value in vars(flow).items() if key in ("hr_size", "gt_size", "levelToName")}
    found: dict[str, dict[str, Any]] = {name: {"sigmoid_output": False, **sizes}}
    prefix = f"{name}." if name else ""
    found |= {f"{prefix}{key}": attributes for key, layer in flow.named_modules() if (attributes := layer_attributes(layer))}
    squeezes = iter([level.squeeze for level in config.levels if level.squeeze > 1])
    for index, layer in enumerate(flow.layers):
        place = f"{prefix}layers.{index}"
        if hasattr(layer, "invconv"):
            found[place] = {"flow_permutation": "invconv", "norm_type": "ActNorm2d"}
            found[f"{place}.invconv"] = {"LU": False}
        elif hasattr(layer, "conv"):
            found[place] = {"logs_eps": 0, "position": None}
        else:
            found[place] = {"factor": next(squeezes)}
        if hasattr(layer, "affine"):
            found[f"{place}.affine"] = {"affine_eps": config.eps, "need_features": True, "le_curve": False}
    return found


def present_attributes(module: nn.Module, attributes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those attributes of submodules that the submodules have; raise Unsupported if another value than theirs is served."""
    modules = dict(module.named_modules())
    found = {}
    for name, values in attributes.items():
        found[name] = {key: value for key, value in values.items() if hasattr(modules[name], key)}
        expect(modules[name], name or "the module", **found[name])
    return {name: values for name, values in found.items() if values}


def layer_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a convolution or a LeakyReLU that its code reads, with the values that are served."""
    if isinstance(module, nn.Conv2d):
        padding = "same" if module.padding == "same" else tuple(size // 2 for size in module.kernel_size)
        return {
            "padding": padding,
            "stride": (1, 1),
            "dilation": (1, 1),
            "groups": 1,
            "padding_mode": "zeros",
            "logscale_factor": LOG_SCALE,
            "do_actnorm": hasattr(module, "actnorm"),
        }
    if isinstance(module, nn.LeakyReLU):
        # in place or not, as now: the encoder's features are taken before or after it accordingly
        return {"negative_slope": SLOPE, "inplace": module.inplace}
    return {}


@lru_cache(maxsize=4)
def skeleton_of(config: NCSRConfig | FlowConfig) -> NCSR:
    """The model without weights, shared by all users that do not fill it; that of a flow alone has no encoder."""
    with torch.device("meta"), _Uninitialised():
        return NCSR(config, nn.Identity() if isinstance(config, FlowConfig) else None)


def entries_of(model: NCSR) -> list[Entry]:
    """The published layout of a model without weights, or of its flow if it has no encoder."""
    with _Uninitialised():
        return list(flow_layout(model, "") if isinstance(model.config, FlowConfig) else layout(model))


class _Uninitialised(TorchFunctionMode):
    """A context that skips initialising parameters, which on the meta device is slow and imports PyTorch's compiler."""

    _UNCHANGED = (Tensor.normal_, Tensor.uniform_, Tensor.mul, Tensor.__mul__, Tensor.mul_)

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        if function in self._UNCHANGED:
            return arguments[0]
        if function is torch.linalg.qr:
            return arguments[0], arguments[0]
        if function is torch.stack:
            return torch.empty(len(arguments[0]), *arguments[0][0].shape)
        return (torch.empty if function is torch.randn else function)(*arguments, **(options or {}))
