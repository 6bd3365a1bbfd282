"""The flow of a published network on the engine, where its encoder is another than those of `ncsr_fast.compat.network`."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.autocast import autocast_dtype
from ncsr_fast.compat.engine import Engine
from ncsr_fast.compat.replacement import Unsupported, check_tensor
from ncsr_fast.compat.served import EngineForward, drawn_latents
from ncsr_fast.compat.structure import compare_parameters, flow_attributes, present_attributes
from ncsr_fast.compat.trial import Pair, Sides, random_images
from ncsr_fast.config import COUPLINGS, INJECTORS, FlowConfig, LevelConfig

_ARGUMENTS = ["gt", "rrdbResults", "z", "epses", "logdet", "reverse", "eps_std", "y_onehot"]


class FlowForward(EngineForward):
    """Replacement of the forward of a published network's `flowUpsamplerNet`, given the features of its encoder.

    `flow(gt, features)` → (z, or the list `epses` with all latents; `logdet` (B,) plus the map's), and with `reverse=True` →
    (image, logdet).
    """

    def __init__(
        self, module: nn.Module, config: FlowConfig, options: dict[str, Any], handed_over: Counter[str] | None = None
    ) -> None:
        served = present_attributes(module, flow_attributes(module, config, ""))
        super().__init__(module, options, served, handed_over)
        self.config = config

    def for_replica(self, replica: nn.Module) -> FlowForward:
        found = FlowForward(replica, self.config, self.options, self.handed_over)
        found.served = self.served
        return found

    def forward(
        self,
        gt: Tensor | None = None,
        rrdbResults: Any = None,
        z: Tensor | None = None,
        epses: Any = None,
        logdet: Any = 0.0,
        reverse: bool = False,
        eps_std: float | None = None,
        y_onehot: Any = None,
    ) -> tuple:
        try:
            self.check()
            if y_onehot is not None:
                raise Unsupported("y_onehot is given")
            engine = self._engine()
            weights = engine.weights.read()
            self.check_actnorms(engine)
            features, state = self._checked(gt, rrdbResults, z, epses, reverse, weights[0])
        except Unsupported as reason:
            arguments = {"z": z, "epses": epses, "logdet": logdet, "reverse": reverse, "eps_std": eps_std, "y_onehot": y_onehot}
            return self.hand_over(reason, "forward", gt, rrdbResults, **arguments)
        with engine.filled(weights, torch.is_grad_enabled()) as filled:
            levels = filled.given(features)
            if reverse:
                latents = self._latents(epses, state, eps_std)
                image, own = filled.decode(latents, levels, None)
                return image, logdet + own
            latents, own = levels.encode(state, None)
        if not isinstance(epses, list):
            return latents[-1], logdet + own
        epses.extend(latents)
        return epses, logdet + own

    undecorated = forward

    def _engine(self) -> Engine:
        if False not in self._engines:
            self._engines[False] = Engine(self.module, self.config, self.options)
        return self._engines[False]

    def _checked(self, gt: Any, features: Any, z: Any, epses: Any, reverse: bool, like: Tensor) -> tuple[list[Tensor], Tensor]:
        """The features of the levels, and the HR images or the top latent, in the dtype of the weights."""
        if not isinstance(features, Mapping):
            raise Unsupported("rrdbResults are no features by name")
        whole = math.prod(level.squeeze for level in self.config.levels)
        *_, top = self.config.latent_shapes(whole, whole)
        given = (epses[-1] if epses else None) if reverse and isinstance(epses, list) else z if reverse else gt
        state = _in_dtype_of(given, like)
        check_tensor("z" if reverse else "gt", state, (None, top[0] if reverse else self.config.channels, None, None), like)
        batch, _, *sides = state.shape
        sides = [side * whole if reverse else side for side in sides]
        if not batch or not all(sides) or any(side % whole for side in sides):
            raise Unsupported(f"there is no image whose sides are multiples of {whole}")
        found, squeeze = [], 1
        for level in self.config.levels:
            squeeze *= level.squeeze
            name = self.module.levelToName.get(int(math.log2(squeeze)))
            own = _in_dtype_of(features.get(name), like)
            check_tensor(f"the features {name}", own, (batch, level.condition_channels, *(s // squeeze for s in sides)), like)
            found.append(own)
        if reverse and isinstance(epses, list):
            shapes = self.config.latent_shapes(*sides)
            if len(epses) != len(shapes):
                raise Unsupported(f"epses has {len(epses)} latents instead of {len(shapes)}")
            for latent, shape in zip(epses, shapes):
                check_tensor("a latent of epses", _in_dtype_of(latent, like), (batch, *shape), like, anywhere=True)
        return found, state

    def _latents(self, epses: Any, state: Tensor, deviation: float | None) -> list[Tensor]:
        if isinstance(epses, list):
            return [latent.to(state) for latent in epses]
        whole = math.prod(level.squeeze for level in self.config.levels)
        *shapes, _ = self.config.latent_shapes(*(side * whole for side in state.shape[2:]))
        return [*drawn_latents(shapes, len(state), deviation, state), state]


def resembles_flow(module: nn.Module) -> bool:
    """True if the module has the layers and the arguments of a published `flowUpsamplerNet`."""
    layers, arguments = getattr(module, "layers", None), list(inspect.signature(type(module).forward).parameters)[1:]
    return isinstance(layers, nn.ModuleList) and arguments == _ARGUMENTS


def recognise_flow(flow: nn.Module) -> FlowConfig:
    """The configuration that the layers of a flow are of; raise Unsupported with the reason if it cannot be served."""
    if not isinstance(getattr(flow, "levelToName", None), Mapping):
        raise Unsupported("it has no `levelToName`, the names of the levels' features")
    config = _configuration_of(flow)
    compare_parameters(flow, config, left_out="f")
    present_attributes(flow, flow_attributes(flow, config, ""))
    return config


def _configuration_of(flow: nn.Module) -> FlowConfig:
    """The configuration that the kinds and the sizes of the layers tell."""
    try:
        levels = [_level(layers) for layers in _by_level(flow.layers)]
        coupling = next(layer.affine for layer in flow.layers if hasattr(layer, "affine"))
        channels = next(layer for layer in flow.layers if hasattr(layer, "invconv")).invconv.weight.shape[0]
        squeezes = [level.squeeze for level in levels]
        return FlowConfig(
            scale=1,
            levels=tuple(levels),
            channels=channels // squeezes[0] ** 2,
            hidden_channels=coupling.fFeatures[0].weight.shape[0],
            eps=coupling.affine_eps,
            lr_multiple=math.prod(squeezes),
        )
    except (AttributeError, StopIteration, IndexError, TypeError, ValueError) as error:
        raise Unsupported(f"its layers are others than those of SRFlow: {error}") from error


def _by_level(layers: nn.ModuleList) -> list[list[nn.Module]]:
    """The layers of each level, which begins with a squeeze or behind a split."""
    levels: list[list[nn.Module]] = []
    ended = True
    for layer in layers:
        if ended or hasattr(layer, "factor"):
            levels.append([])
        levels[-1].append(layer)
        ended = hasattr(layer, "conv")
    return levels


def _level(layers: list[nn.Module]) -> LevelConfig:
    steps = [layer for layer in layers if hasattr(layer, "invconv")]
    coupled = [layer for layer in steps if hasattr(layer, "affine")]
    last = layers[-1]
    return LevelConfig(
        steps=len(coupled),
        condition_channels=coupled[0].affine.fFeatures[0].weight.shape[1],
        branches=(INJECTORS, COUPLINGS),
        transition_steps=len(steps) - len(coupled),
        split_channels=last.conv.bias.shape[0] // 2 if hasattr(last, "conv") else 0,
        squeeze=getattr(layers[0], "factor", 1),
    )


def compared_flow(config: FlowConfig, sides: Sides, direction: str, like: Tensor, generator: torch.Generator) -> Iterator[Pair]:
    """The pairs that a trial of a flow of this configuration compares."""
    whole = math.prod(level.squeeze for level in config.levels)
    shapes, squeeze = {"gt": (config.channels, 2 * whole, 2 * whole)}, 1
    for level in config.levels:
        squeeze *= level.squeeze
        side = 2 * whole // squeeze
        shapes[sides.module.levelToName[int(math.log2(squeeze))]] = (level.condition_channels, side, side)
    images = random_images(shapes, like, generator)
    gt, features = images.pop("gt"), images
    sides.module.train()
    sides.own(gt, features)
    sides.module.eval()
    logdet = torch.zeros_like(gt[:, 0, 0, 0])
    theirs, ours = sides.both(0, lambda: {"gt": gt, "rrdbResults": features, "epses": [], "logdet": logdet})
    yield from map(Pair, [*theirs[0], theirs[1]], [*ours[0], ours[1]])
    if direction == "decode":
        latents = theirs[0]
        theirs, ours = sides.both(0, lambda: {"rrdbResults": features, "epses": list(latents), "reverse": True})
        yield from (Pair(*pair, float((ours[0] - gt).abs().max())) for pair in zip(theirs, ours))


def describe_flow(config: FlowConfig) -> str:
    """The flow in a few words."""
    steps = " + ".join(str(level.steps) for level in config.levels)
    return f"a flow of {len(config.levels)} levels, {steps} steps, with features of its own encoder"


def _in_dtype_of(tensor: Any, like: Tensor) -> Any:
    """A tensor that autocast made, in the dtype of the weights."""
    is_cast = isinstance(tensor, Tensor) and autocast_dtype(like.device.type) is not None
    return tensor.to(like.dtype) if is_cast else tensor
