"""A replacement whose layers are served as they were at recognition."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.compat.engine import Engine
from ncsr_fast.compat.replacement import Passing, Replacement, Unsupported, expect


class EngineForward(Replacement):
    """Replacement of a forward by an `Engine` on the module's parameters.

    Args:
        module: The network, or the flow.
        options: Fields of `EngineOptions`. Without `precision`, float32 convolutions on a GPU are rounded to TF32 if PyTorch's
            flags say so, as in the published network.
        served: The attributes of its layers, by name, that were served at recognition.
        handed_over: The count of calls that ran the module's own code, by reason.
    """

    def __init__(
        self, module: nn.Module, options: dict[str, Any], served: dict[str, dict[str, Any]], handed_over: Counter[str] | None
    ) -> None:
        super().__init__(module, handed_over)
        self.options, self.served = options, served
        self._engines: dict[bool, Engine] = {}  # with and without the noise couplings
        self._layers: list[tuple[str, nn.Module, dict[str, Any]]] | None = None  # the served layers, found by name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engines": {}}  # a copy has its own engines

    def undecorated(self, *arguments: Any, **options: Any) -> tuple:
        """As the replaced `forward`, at the precision of the context."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        if self._layers is None:
            modules = dict(self.module.named_modules())
            if not self.served.keys() <= modules.keys():
                raise Unsupported("submodules were removed")
            self._layers = [(name, modules[name], attributes) for name, attributes in self.served.items()]
        for name, layer, attributes in self._layers:
            expect(layer, name, **attributes)

    @staticmethod
    def check_actnorms(engine: Engine) -> None:
        """Raise Passing unless the actnorms are initialised."""
        if any(module.training and not getattr(module, "inited", True) for module in engine.weights.modules):
            raise Passing("actnorms are not initialised, which the network's own forward does")


def drawn_latents(shapes: list[tuple[int, int, int]], batch: int, deviation: float, like: Tensor) -> list[Tensor]:
    """Latents of the splits, in encoding order, drawn as the published networks draw them.

    They are drawn on the default device, in the default dtype, and from the top level down.
    """
    drawn = []
    for shape in reversed(shapes):
        size = (batch, *shape)
        drawn.append(torch.normal(mean=torch.zeros(size), std=torch.ones(size) * deviation).to(like))
    return drawn[::-1]
