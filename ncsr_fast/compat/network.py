"""A whole published NCSR or SRFlow network on the engine: the same calls, the same results."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.compat.engine import Engine, Filled
from ncsr_fast.compat.replacement import Replacement, Unsupported, check_tensor, expect
from ncsr_fast.compat.structure import Call, configuration_of, served_attributes
from ncsr_fast.config import NCSRConfig
from ncsr_fast.flow.conditioned import Levels
from ncsr_fast.ops.reference import gaussian_log_density


class NetworkForward(Replacement):
    """Replacement of the forward of a published network.

    `net(gt=…, lr=…)` → (z, or the list `epses` with all latents; nll (B,) in bits per pixel position; logdet (B,)), and with
    `reverse=True` → (image, logdet). Random numbers are drawn from the same generators in the same order.

    Args:
        options: Fields of `EngineOptions`. Without `precision`, float32 convolutions on a GPU are rounded to TF32 if PyTorch's
            flags say so, as in the published network.
    """

    def __init__(
        self,
        module: nn.Module,
        config: NCSRConfig,
        options: dict[str, Any],
        handed_over: Counter[str] | None = None,
        served: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(module, handed_over)
        self.config, self.options = config, options
        self.served = served_attributes(module, config) if served is None else served  # the attributes at recognition
        self._engines: dict[bool, Engine] = {}  # with and without the noise couplings
        self._layers: list[tuple[str, nn.Module, dict[str, Any]]] | None = None  # the served layers, found by name

    def for_replica(self, replica: nn.Module) -> NetworkForward:
        return NetworkForward(replica, self.config, self.options, self.handed_over, self.served)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engines": {}}  # a copy has its own engines

    def forward(self, *arguments: Any, **options: Any) -> tuple:
        try:
            call = Call.of(*arguments, **options)
            self.check()
            engine = self._engine(call.std is not None)
            weights = engine.weights.read()
            self._check_call(call, engine, weights[0])
        except Unsupported as reason:
            return self.hand_over(str(reason), "forward", *arguments, **options)
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
        if self._layers is None:
            modules = dict(self.module.named_modules())
            if not self.served.keys() <= modules.keys():
                raise Unsupported("submodules were removed")
            self._layers = [(name, modules[name], attributes) for name, attributes in self.served.items()]
        for name, layer, attributes in self._layers:
            expect(layer, name, **attributes)

    def _check_call(self, call: Call, engine: Engine, like: Tensor) -> None:
        """Raise Unsupported unless the arguments are those of a published program, and the actnorms are initialised."""
        for module in engine.weights.modules:
            if module.training and not getattr(module, "inited", True):
                raise Unsupported("actnorms are not initialised, which the network's own forward does")
        if call.y_label is not None:
            raise Unsupported("y_label is given")
        batch, height, width = self._check_images(call, like)
        shapes = [(batch, *shape) for shape in engine.skeleton.latent_shapes(height, width)]
        if call.reverse and isinstance(call.epses, list):
            if len(call.epses) != len(shapes):
                raise Unsupported(f"epses has {len(call.epses)} latents instead of {len(shapes)}")
            for latent, shape in zip(call.epses, shapes):
                check_tensor("a latent of epses", latent, shape, like, anywhere=True)
        elif call.reverse:
            check_tensor("z", call.z, shapes[-1], like)
        if call.std is not None:
            self._check_noise(call.std, batch, like)

    def _check_images(self, call: Call, like: Tensor) -> tuple[int, int, int]:
        """Batch and size of the LR image."""
        scale = self.config.scale
        if call.lr_enc is not None and not call.reverse:
            check_tensor("gt", call.gt, (None, 3, None, None), like)
            batch, height, width = (call.gt.shape[0], *(side // scale for side in call.gt.shape[2:]))
        else:
            check_tensor("lr", call.lr, (None, 3, None, None), like)
            batch, height, width = call.lr.shape[0], *call.lr.shape[2:]
        if not batch or not height or not width or height % 2 or width % 2:
            raise Unsupported("there is no LR image with even sides")
        if not call.reverse:
            check_tensor("gt", call.gt, (batch, 3, scale * height, scale * width), like)
        if call.lr_enc is not None:
            channels = self.config.condition_channels
            for level, features in enumerate(self._given_features(call), start=1):
                shape = (batch, channels, scale * height >> level, scale * width >> level)
                check_tensor("a feature map of lr_enc", features, shape, like)
        return batch, height, width

    def _check_noise(self, std: Tensor, batch: int, like: Tensor) -> None:
        if not self.config.noise_channels:
            raise Unsupported("std is given, but the network has no noise condition")
        check_tensor("std", std, (batch, None, None, None), like)
        image = self.config.noise_channels == 3 and std.shape[1] == 3
        if not image and tuple(std.shape[1:]) != (1, 1, 1):
            raise Unsupported("std is neither a noise image nor one number for each image")

    def _given_features(self, call: Call) -> list[Tensor]:
        """The features in `lr_enc` that the levels are conditioned on, from the HR side; None if one is missing."""
        return [call.lr_enc.get(f"fea_up{self.config.scale >> level}") for level in range(1, self.config.levels + 1)]

    def _encode(self, call: Call, filled: Filled) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
        z, pixels = call.gt, call.gt.shape[2] * call.gt.shape[3]
        if call.add_gt_noise and self._dequantises():
            z = z + ((torch.rand(z.shape, device=z.device) - 0.5) / self.module.quant).to(z)
        latents, logdet = self._condition(call, filled).encode(z, self._noise(call))
        if call.add_gt_noise:
            logdet = logdet - math.log(self.module.quant) * pixels
        nll = (logdet + gaussian_log_density(latents[-1]).sum(dim=(1, 2, 3))) / (-math.log(2) * pixels)
        if not isinstance(call.epses, list):
            return latents[-1], nll, logdet
        call.epses.extend(latents)
        return call.epses, nll, logdet

    def _decode(self, call: Call, filled: Filled) -> tuple[Tensor, Tensor]:
        latents = self._latents(call, filled)
        image, logdet = filled.decode(latents, self._condition(call, filled), self._noise(call))
        if call.add_gt_noise:
            logdet = logdet + math.log(self.module.quant) * call.lr.shape[2] * call.lr.shape[3] * self.config.scale**2
        return image, logdet

    def _latents(self, call: Call, filled: Filled) -> list[Tensor]:
        """The latents in encoding order.

        Latents of splits that are not given are drawn as the network draws them: on the default device, in the default dtype,
        and from the top level down.
        """
        if isinstance(call.epses, list):
            return [latent.to(call.lr) for latent in call.epses]
        *shapes, _ = filled.model.latent_shapes(*call.lr.shape[2:])
        drawn = []
        for shape in reversed(shapes):
            size = (call.lr.shape[0], *shape)
            drawn.append(torch.normal(mean=torch.zeros(size), std=torch.ones(size) * call.eps_std).to(call.lr))
        return [*reversed(drawn), call.z]

    def _condition(self, call: Call, filled: Filled) -> Levels:
        return filled.given(self._given_features(call)) if call.lr_enc is not None else filled.condition(call.lr)

    def _noise(self, call: Call) -> Tensor | None:
        if call.std is None or self.config.noise_channels == call.std.shape[1]:
            return call.std
        return call.std.expand(-1, self.config.noise_channels, -1, -1)

    def _dequantises(self) -> bool:
        section: Any = self.module.opt
        for key in ("network_G", "flow", "augmentation", "noiseQuant"):
            section = section.get(key) if section is not None else None
        return section is None or bool(section)
