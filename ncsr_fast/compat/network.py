"""A whole published network of the family on the engine: the same calls, the same results."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.autocast import undecorated
from ncsr_fast.compat.calls import Call, call_of
from ncsr_fast.compat.engine import Engine, Filled
from ncsr_fast.compat.replacement import Unsupported, check_tensor
from ncsr_fast.compat.served import EngineForward, drawn_latents
from ncsr_fast.compat.structure import configuration_of, served_attributes
from ncsr_fast.compat.trial import Pair, Sides, random_images
from ncsr_fast.config import FlowConfig, NCSRConfig
from ncsr_fast.flow.conditioned import Levels
from ncsr_fast.ops.reference import gaussian_log_density


class NetworkForward(EngineForward):
    """Replacement of the forward of a published network.

    `net(gt=…, lr=…)` → (z, or the list `epses` with all latents; nll (B,) in bits per pixel position; logdet (B,)), and with
    `reverse=True` → (image, logdet). Random numbers are drawn from the same generators in the same order. Where a
    `torch.autocast` decorates the network's forward, calls run under it too.
    """

    def __init__(
        self,
        module: nn.Module,
        config: NCSRConfig,
        options: dict[str, Any],
        handed_over: Counter[str] | None = None,
        served: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(module, options, served_attributes(module, config) if served is None else served, handed_over)
        self.config, self.flow, self._calls = config, _with_fewest_pixels(config), call_of(config)

    def for_replica(self, replica: nn.Module) -> NetworkForward:
        return NetworkForward(replica, self.config, self.options, self.handed_over, self.served)

    def forward(self, *arguments: Any, **options: Any) -> tuple:
        _, decoration = undecorated(type(self.module).forward)
        if decoration is None:
            return self.undecorated(*arguments, **options)
        with copy.copy(decoration):  # calls in several threads have their own
            return self.undecorated(*arguments, **options)

    def undecorated(self, *arguments: Any, **options: Any) -> tuple:
        try:
            call = self._calls.of(*arguments, **options)
            self.check()
            engine = self._engine(call.std is not None)
            weights = engine.weights.read()
            self._check_call(call, engine, weights[0])
        except Unsupported as reason:
            return self.hand_over(reason, "forward", *arguments, **options)
        recorded = torch.is_grad_enabled() and (not call.reverse or call.reverse_with_grad)
        with torch.set_grad_enabled(recorded), engine.filled(weights, recorded) as filled:
            return self._decode(call, filled) if call.reverse else self._encode(call, filled)

    def _engine(self, conditioned: bool) -> Engine:
        if conditioned not in self._engines:
            config = self.config if conditioned else replace(self.config, noise_steps=())
            self._engines[conditioned] = Engine(self.module, config, self.options)
        return self._engines[conditioned]

    def check(self) -> None:
        super().check()
        if replace(configuration_of(self.module), noise_steps=()) != replace(self.config, noise_steps=()):
            raise Unsupported("its options `opt` have changed since it was recognised")

    def _check_call(self, call: Call, engine: Engine, like: Tensor) -> None:
        """Raise Unsupported unless the arguments are those of a published program, and the actnorms are initialised."""
        self.check_actnorms(engine)
        call.check()
        batch, height, width = self._check_images(call, like)
        shapes = [(batch, *shape) for shape in self.flow.latent_shapes(height, width)]
        if call.reverse and isinstance(call.epses, list):
            if len(call.epses) != len(shapes):
                raise Unsupported(f"epses has {len(call.epses)} latents instead of {len(shapes)}")
            for latent, shape in zip(call.epses, shapes):
                check_tensor("a latent of epses", latent, shape, like, anywhere=True)
        elif call.reverse and self.flow.prior == "standard":  # LLFlow's z is not read
            check_tensor("z", call.z, shapes[-1], like)
        if call.std is not None:
            self._check_noise(call.std, batch, like)

    def _check_images(self, call: Call, like: Tensor) -> tuple[int, int, int]:
        """Batch and size of the LR image."""
        flow = self.flow
        if call.lr_enc is not None and not call.reverse:
            check_tensor("gt", call.gt, (None, flow.channels, None, None), like)
            batch, height, width = (call.gt.shape[0], *(side // flow.scale for side in call.gt.shape[2:]))
        else:
            check_tensor("lr", call.lr, (None, flow.lr_channels, None, None), like)
            batch, height, width = call.lr.shape[0], *call.lr.shape[2:]
        if not batch or not height or not width or height % flow.lr_multiple or width % flow.lr_multiple:
            raise Unsupported(f"there is no LR image whose sides are multiples of {flow.lr_multiple}")
        if not call.reverse:
            check_tensor("gt", call.gt, (batch, flow.channels, flow.scale * height, flow.scale * width), like)
        if call.lr_enc is not None:
            channels, (features, mean) = self.config.condition_channels, self._given(call)
            for own, side in zip(features, flow.level_scales()):
                check_tensor("a feature map of lr_enc", own, (batch, channels, int(side * height), int(side * width)), like)
            if flow.prior == "encoder":
                check_tensor("color_map of lr_enc", mean, (batch, flow.channels, height, width), like)
        return batch, height, width

    def _check_noise(self, std: Tensor, batch: int, like: Tensor) -> None:
        check_tensor("std", std, (batch, None, None, None), like)
        image = self.config.noise_channels == 3 and std.shape[1] == 3
        if not image and tuple(std.shape[1:]) != (1, 1, 1):
            raise Unsupported("std is neither a noise image nor one number for each image")

    def _given(self, call: Call) -> tuple[list[Tensor], Tensor | None]:
        """The features in `lr_enc` of the levels, from the HR side, and the colour map; None for what is missing."""
        names = published_names(self.flow.level_scales(), 4 if self.flow.prior == "encoder" else 1)
        return [call.lr_enc.get(name) for name in names], call.lr_enc.get("color_map")

    def _encode(self, call: Call, filled: Filled) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
        z, pixels, levels = call.gt, call.gt.shape[2] * call.gt.shape[3], self._condition(call, filled)
        deviation = self.config.traits.gaussian_noise
        if call.add_gt_noise and deviation:
            z = z + (torch.randn(z.shape, device=z.device) * deviation).to(z)
        elif call.add_gt_noise and self._dequantises():
            z = z + ((torch.rand(z.shape, device=z.device) - 0.5) / self.module.quant).to(z)
        latents, logdet = levels.encode(z, self._noise(call))
        if call.add_gt_noise and not deviation:
            logdet = logdet - math.log(self.module.quant) * pixels
        top = latents[-1] - self._prior_mean(call, levels, filled) if self.flow.prior == "encoder" else latents[-1]
        nll = (logdet + gaussian_log_density(top).sum(dim=(1, 2, 3))) / (-math.log(2) * pixels)
        collected = self._collected(call)
        if collected is None:
            return latents[-1], nll, logdet
        collected.extend(latents)
        return collected, nll, logdet

    def _prior_mean(self, call: Call, levels: Levels, filled: Filled) -> Tensor:
        """The mean of LLFlow's prior: that of the condition, or by chance that of the HR images."""
        if random.random() > self.module.opt["train_gt_ratio"]:
            return levels.condition.prior_mean
        return filled.model.encoder.reference_prior_mean(call.gt)

    def _collected(self, call: Call) -> list | None:
        """The list that latents are appended to, of which LLFlow's calls have one for each GPU."""
        index = call.gt.device.index
        if self.flow.prior == "encoder" and call.epses is not None and index is not None:
            return call.epses[index]
        return call.epses if isinstance(call.epses, list) else None

    def _decode(self, call: Call, filled: Filled) -> tuple[Tensor, Tensor]:
        levels = self._condition(call, filled)
        image, logdet = filled.decode(self._latents(call, levels), levels, self._noise(call))
        if call.add_gt_noise:
            logdet = logdet + math.log(self.module.quant) * call.lr.shape[2] * call.lr.shape[3] * self.config.scale**2
        return image, logdet

    def _latents(self, call: Call, levels: Levels) -> list[Tensor]:
        """The latents in encoding order; the top latent of LLFlow is the mean of its prior."""
        if isinstance(call.epses, list):
            return [latent.to(call.lr) for latent in call.epses]
        *shapes, _ = self.flow.latent_shapes(*call.lr.shape[2:])
        top = call.z if self.flow.prior == "standard" else levels.condition.prior_mean
        return [*drawn_latents(shapes, len(call.lr), call.eps_std, call.lr), top]

    def _condition(self, call: Call, filled: Filled) -> Levels:
        return filled.condition(call.lr) if call.lr_enc is None else filled.given(*self._given(call))

    def _noise(self, call: Call) -> Tensor | None:
        if call.std is None or self.config.noise_channels == call.std.shape[1]:
            return call.std
        return call.std.expand(-1, self.config.noise_channels, -1, -1)

    def _dequantises(self) -> bool:
        section: Any = self.module.opt
        for key in ("network_G", "flow", "augmentation", "noiseQuant"):
            section = section.get(key) if section is not None else None
        return section is None or bool(section)


def compared(config: NCSRConfig, sides: Sides, direction: str, like: Tensor, generator: torch.Generator) -> Iterator[Pair]:
    """The pairs that a trial of a network of this configuration compares."""
    flow, is_low_light = config.flow, config.flow.prior == "encoder"
    side = max(8, 2 * flow.lr_multiple)  # the published encoder of ×8 takes no less than 8
    shapes = {"lr": (flow.lr_channels, side, side), "gt": (flow.channels, flow.scale * side, flow.scale * side)}
    if config.noise_channels:
        shapes["std"] = shapes["gt"] if config.noise_channels == 3 else (1, 1, 1)
    images = random_images(shapes, like, generator)
    collects = {} if is_low_light else {"epses": []}  # LLFlow's only latent is z
    sides.module.train()
    sides.own(**images)
    sides.module.eval()
    # of LLFlow's draws one has each mean, at the published ratios
    for arguments, seed in (({}, 0), ({"add_gt_noise": True}, 1)) if direction == "encode" else (({}, 0),):
        theirs, ours = sides.both(seed, lambda: {**images, **arguments, **copy.deepcopy(collects)})
        latents, found = ([each[0]] if is_low_light else each[0] for each in (theirs, ours))
        yield from map(Pair, [*latents, *theirs[1:]], [*found, *ours[1:]])
    if direction == "decode":
        gt = images.pop("gt")
        for given in ({"epses": latents}, {"epses": None}) if is_low_light else ({"epses": latents},):
            theirs, ours = sides.both(0, lambda: {**images, **given, "reverse": True})
            inaccuracy = float((ours[0] - gt).abs().max()) if given["epses"] else 0.0
            yield from (Pair(*pair, inaccuracy) for pair in zip(theirs, ours))


def published_names(level_scales: tuple[float, ...], factor: int) -> list[str]:
    """The names of the features of levels whose sides over those of LR are these, `factor` times the published ones."""
    names = {4: "fea_up4", 2: "fea_up2", 1: "fea_up1", 0.5: "fea_up0", 0.25: "fea_up-1", 0.125: "fea_up-2"}
    return [names[factor * side] for side in level_scales]


def _with_fewest_pixels(config: NCSRConfig) -> FlowConfig:
    """The flow, of LR images whose sides are multiples of no more than its squeezes need."""
    squeeze = math.prod(level.squeeze for level in config.flow.levels)
    return replace(config.flow, lr_multiple=max(1, squeeze // config.scale))
