"""The networks the drop-in is tested with: stand-ins, and the published ones where a checkout is named."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from compat.standin import StandIn, StandInNCSR
from support import image, randomize

import ncsr_fast
from ncsr_fast.compat.accelerate import AccelerationReport

_NOT_NEEDED = ("cv2", "yaml", "torchvision", "torchvision.utils", "natsort", "imageio")


@dataclass(frozen=True)
class Network:
    """A kind of network, small; `published` is the real one, whose widths are fixed."""

    name: str
    scale: int = 4
    noise: int = 3
    published: bool = False

    @property
    def options(self) -> dict:
        width = 64 if self.published else 4
        noise = {"std_channels": self.noise, "S": [0, 1, 2, 1][: self.scale.bit_length()]} if self.noise else {}
        return {
            "scale": self.scale,
            "datasets": {"train": {"quant": 32}},
            "network_G": {
                "which_model_G": "NCSRNet" if self.noise else "SRFlowNet", "nf": width, "gc": width // 2, "nb": 4,
                "flow": {
                    "K": 2, "L": self.scale.bit_length(), "coupling": "CondAffineSeparatedAndCond",
                    "additionalFlowNoAffine": 2, "split": {"enable": True}, "fea_up0": True,
                    "stackRRDB": {"blocks": [0, 1, 2, 3], "concat": True},
                    "CondAffineSeparatedAndCond": {"hidden_channels": width}, **noise,
                },
            },
        }  # fmt: skip

    def fresh(self) -> torch.nn.Module:
        """With its actnorms not initialised."""
        torch.manual_seed(0)
        options = self.options
        if not self.published:
            return (StandInNCSR if self.noise else StandIn)(options)
        network = options["network_G"]
        build = published_class(network["which_model_G"], "NCSR_PUBLISHED" if self.noise else "NCSR_PUBLISHED_SRFLOW")
        return build(3, 3, 64, network["nb"], gc=32, scale=self.scale, K=network["flow"]["K"], opt=options)

    def build(self, dtype: torch.dtype = torch.float64, step: float = 0.01) -> torch.nn.Module:
        """In evaluation mode, every parameter moved off its initial value."""
        return randomize(self.fresh().double(), amount=step).to(dtype).eval()

    def images(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, torch.Tensor]:
        """The arguments of a training step: images whose sides differ."""
        inputs = {"lr": (2, 3, 8, 10), "gt": (2, 3, 8 * self.scale, 10 * self.scale)}
        if self.noise:
            inputs["std"] = inputs["gt"] if self.noise == 3 else (2, 1, 1, 1)
        return {name: image(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(inputs.items())}

    def condition(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        """That of a sample."""
        return {"std": torch.zeros(2, 1, 1, 1, dtype=dtype)} if self.noise else {}


def published_class(name: str, variable: str) -> type[torch.nn.Module]:
    """Of the checkout that an environment variable names; skips without one."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout of the published program")
    checkout = Path(os.environ[variable])
    kept = dict(sys.modules)  # the two programs have modules of the same names
    absent = {module: mock.MagicMock() for module in _NOT_NEEDED}
    with (
        mock.patch.dict(sys.modules, absent),
        mock.patch.object(sys, "path", [str(next(checkout.glob("**/models/modules")).parents[1]), *sys.path]),
    ):
        try:
            return getattr(importlib.import_module(f"models.modules.{name}_arch"), name)
        finally:
            for module in set(sys.modules) - set(kept):
                if module.split(".")[0] in ("models", "utils", "options"):
                    del sys.modules[module]


STAND_INS = [Network("ncsr"), Network("ncsr-std", noise=1), Network("ncsr-x8", scale=8), Network("srflow", noise=0)]
PUBLISHED = [Network(f"published-{network.name}", network.scale, network.noise, True) for network in STAND_INS]
SMALL = STAND_INS[0]


def twins(network: Network, dtype: torch.dtype = torch.float64, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same network twice: for us, and untouched."""
    net = network.build(dtype, **options)
    return net, copy.deepcopy(net)


@functools.cache
def _accelerated(network: Network, dtype: torch.dtype, step: float) -> tuple:
    net, untouched = twins(network, dtype, step=step)
    return net, untouched, ncsr_fast.accelerate(net)


def accelerated_twins(
    network: Network, dtype: torch.dtype = torch.float64, step: float = 0.01
) -> tuple[torch.nn.Module, torch.nn.Module, AccelerationReport]:
    """The same network accelerated, and untouched, and the report: copies of what is made once, whose trials take longer."""
    return copy.deepcopy(_accelerated(network, dtype, step))


def gradients(net: torch.nn.Module, **arguments) -> dict[str, torch.Tensor | None]:
    net.zero_grad()
    net(**arguments)[1].mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}
