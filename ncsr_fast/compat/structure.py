"""Recognition of networks of the published NCSR and SRFlow programs by module tree, parameters and attributes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ncsr_fast.autocast import without_autocast
from ncsr_fast.checkpoints.published import Entry, layout
from ncsr_fast.compat.replacement import Replacement, Unsupported, expect
from ncsr_fast.config import NCSRConfig
from ncsr_fast.encoder.blocks import SLOPE
from ncsr_fast.engine.folding import LOG_SCALE
from ncsr_fast.model import NCSR
from ncsr_fast.precision import true_float32


@dataclass
class Call:
    """The arguments of a published network's forward."""

    gt: Tensor | None = None
    lr: Tensor | None = None
    z: Tensor | None = None
    eps_std: float | None = None
    reverse: bool = False
    epses: Any = None
    reverse_with_grad: bool = False
    lr_enc: Mapping[str, Tensor] | None = None
    add_gt_noise: bool = False
    step: Any = None  # ignored, as in the published network
    y_label: Any = None
    std: Tensor | None = None  # only in NCSR

    @classmethod
    def of(cls, *arguments: Any, **options: Any) -> Call:
        """The call with these arguments; raise Unsupported for others, about which the network itself raises an error."""
        try:
            return cls(*arguments, **options)
        except TypeError as error:
            raise Unsupported(f"its arguments are others: {error}") from error


def resembles_network(module: nn.Module) -> bool:
    """True if the module has the parts of a published network."""
    layers = getattr(getattr(module, "flowUpsamplerNet", None), "layers", None)
    return isinstance(getattr(module, "RRDB", None), nn.Module) and isinstance(layers, nn.ModuleList)


def recognise(net: nn.Module) -> NCSRConfig:
    """The configuration of a published network; raise Unsupported with the reason if it cannot be served.

    The options that the network was built with give the architecture. Everything visible is compared with it: the names and
    shapes of all parameters, the attributes of the layers, the arguments of `forward`.
    """
    names = [field.name for field in fields(Call)]
    arguments = list(inspect.signature(type(net).forward).parameters)[1:]
    if arguments not in (names, names[:-1]):
        raise Unsupported(f"its forward takes ({', '.join(arguments)}) instead of ({', '.join(names)})")
    config = configuration_of(net)
    if bool(config.noise_channels) != ("std" in arguments):
        raise Unsupported("its options and its forward do not agree on a noise condition")
    config = replace(config, noise_steps=_noise_steps(net, config))
    _compare_parameters(net, config)
    for name, attributes in served_attributes(net, config).items():
        expect(net.get_submodule(name), name, **attributes)
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
    if config.system not in ("ncsr", "fs-ncsr"):
        raise Unsupported(f"it is {config.traits.title}'s, which is served by ncsr_fast.from_published alone")
    return replace(config, system="ncsr")  # FS-NCSR's networks are NCSR's


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


def _compare_parameters(net: nn.Module, config: NCSRConfig) -> None:
    expected = {entry.name: entry.shape for entry in entries_of(skeleton_of(config))}
    found = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
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
    found: dict[str, dict[str, Any]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            same = tuple(size // 2 for size in module.kernel_size)
            padding = "same" if module.padding == "same" else same
            found[name] = {"padding": padding, "stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
            found[name] |= {"logscale_factor": LOG_SCALE, "do_actnorm": True}
        elif isinstance(module, nn.LeakyReLU):
            # in place or not, as now: the encoder's features are taken before or after it accordingly
            found[name] = {"negative_slope": SLOPE, "inplace": module.inplace}
    first = [config.steps - count for count in config.noise_steps]  # the first steps that use their noise coupling
    used = iter([bool(config.noise_channels) and k >= start for start in first for k in range(config.steps)])
    for index, layer in enumerate(net.flowUpsamplerNet.layers):
        name = f"flowUpsamplerNet.layers.{index}"
        if hasattr(layer, "invconv"):
            found[name] = {"flow_permutation": "invconv", "norm_type": "ActNorm2d"}
            found[f"{name}.invconv"] = {"LU": False}
        elif hasattr(layer, "conv"):
            found[name] = {"logs_eps": 0, "position": None}
        else:
            found[name] = {"factor": 2}
        if hasattr(layer, "affine"):
            found[f"{name}.affine"] = {"affine_eps": config.eps, "need_features": True, "stdmode": next(used)}
    modules = dict(net.named_modules())
    return {
        name: {attribute: value for attribute, value in attributes.items() if hasattr(modules[name], attribute)}
        for name, attributes in found.items()
    }


@lru_cache(maxsize=4)
def skeleton_of(config: NCSRConfig) -> NCSR:
    """The model without weights, shared by all users that do not fill it."""
    with torch.device("meta"), _Uninitialised():
        return NCSR(config)


def entries_of(model: NCSR) -> list[Entry]:
    """`layout` of a model without weights."""
    with _Uninitialised():
        return list(layout(model))


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


_TOLERANCE = 1e-4  # relative to the largest element: rounding is below 1e-5, a different formula far above
_SIZE = 8  # side of the LR image, the smallest for the published encoder
# Size of random changes of parameters, so that zero-initialised layers compute something. Larger ones make inverses explode.
_STEPS = {"encode": 3e-3, "decode": 3e-4}


@torch.no_grad()
def disagreement(net: nn.Module, config: NCSRConfig, ours: Callable[[nn.Module], Replacement]) -> str | None:
    """The difference between the results of a copy of `net` and of `ours(copy)` on a small image, in words; None: none.

    A class may have the same structure and compute something else. Neither the network nor a random generator is changed.
    """
    for direction, step in _STEPS.items():
        try:
            trial, generator = copy.deepcopy(net).float(), torch.Generator().manual_seed(0)
            for parameter in trial.parameters():
                parameter.add_(step * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter))
            images = _trial_images(config, next(trial.parameters()), generator)
            replacement = ours(trial)
            like = next(trial.parameters())
            with true_float32(like), without_autocast(like.device.type):
                trial.train()
                replacement.own("forward", **images)  # initialises the actnorms, without which inverses explode
                trial.eval()
                found = _differences(replacement, direction, images)
        except Exception as error:  # unknown code may raise anything
            return f"it fails for a small image: {type(error).__name__}: {error}"
        reason = next(iter(replacement.handed_over), found)
        if reason is not None:
            return reason
    return None


def _trial_images(config: NCSRConfig, like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    inputs = {"lr": (3, _SIZE, _SIZE), "gt": (3, config.scale * _SIZE, config.scale * _SIZE)}
    if config.noise_channels:
        inputs["std"] = inputs["gt"] if config.noise_channels == 3 else (1, 1, 1)
    return {name: torch.rand(1, *shape, generator=generator, device="cpu").to(like) for name, shape in inputs.items()}


def _differences(replacement: Replacement, direction: str, images: dict[str, Tensor]) -> str | None:
    latents, *likelihood = replacement.own("forward", **images, epses=[])
    if direction == "encode":
        found, *found_likelihood = replacement.forward(**images, epses=[])
        pairs, inaccuracy = [*zip(latents, found), *zip(likelihood, found_likelihood)], 0.0
    else:
        gt = images.pop("gt")
        arguments = {**images, "epses": latents, "reverse": True}
        image, found = replacement.own("forward", **arguments), replacement.forward(**arguments)
        pairs, inaccuracy = [*zip(image, found)], float((found[0] - gt).abs().max())  # error of inverting in float32
    for theirs, own in pairs:
        allowed = _TOLERANCE * float(theirs.abs().max()) + 10 * inaccuracy
        if not float((theirs - own).abs().max()) <= allowed:
            return f"it {direction}s to something else than a network of this structure does"
    return None
