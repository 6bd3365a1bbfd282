"""What is measured: every operator, on the inputs it has in a model, at the shapes it has there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ncsr_fast import NCSRConfig


@dataclass(frozen=True)
class Use:
    """A model at work: what decides the sizes of its states, and whether it records gradients."""

    preset: str
    batch: int
    lr: tuple[int, int]  # height and width of the LR image
    training: bool = False


USES = {
    "x4-train": Use("ncsr-x4", 18, (40, 40), training=True),  # HR 160×160, batch 18, as published
    "x8-train": Use("ncsr-x8", 18, (20, 20), training=True),
    "sample": Use("ncsr-x4", 1, (40, 40)),
    "large": Use("ncsr-x4", 1, (160, 160)),
    "div2k": Use("ncsr-x4", 1, (340, 510)),
    "quick": Use("ncsr-x4", 2, (4, 4), training=True),  # to see that everything runs, not to measure
}


@dataclass(frozen=True)
class Shape:
    """The state inside a level."""

    size: tuple[int, int, int, int]  # (B, C, H, W)
    split: int  # channels taken out by the split that closes the level, 0 without one
    training: bool
    used_by: tuple[str, ...]

    def __str__(self) -> str:
        return "×".join(map(str, self.size))


def level_shapes(name: str) -> list[Shape]:
    """The states of the model of `USES[name]`, from the HR side."""
    use = USES[name]
    config = NCSRConfig.preset(use.preset)
    height, width = (config.scale * side for side in use.lr)
    return [
        Shape(
            size=(use.batch, channels, height >> level, width >> level),
            split=config.split_channels(level - 1, channels),
            training=use.training,
            used_by=(f"{name} level {level}",),
        )
        for level, channels in enumerate(config.level_channels(), start=1)
    ]


DTYPES = {  # of the state, and of what a network says (h)
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),  # networks in bfloat16, the state in float32: training in "bf16"
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


class Draw:
    """Random inputs for one shape, the same every time. Parameters are float32 always."""

    def __init__(self, shape: Shape, dtype: str, layout: str, device: str) -> None:
        self.shape, self.channels = shape, shape.size[1]
        self._state_dtype, self._network_dtype = DTYPES[dtype]
        self._layout, self._device = LAYOUTS[layout], device
        self._generator = torch.Generator().manual_seed(0)

    def state(self) -> Tensor:
        return self._image(self.channels).to(self._state_dtype)

    def network(self, channels: int) -> Tensor:
        """What a network says of `channels` channels: interleaved pairs, of a magnitude it has in a trained model."""
        return (0.5 * self._image(2 * channels)).to(self._network_dtype)

    def actnorm_invconv(self) -> dict[str, Tensor]:
        """bias, logs and weight, the weight a rotation as at initialisation."""
        bias, logs = (0.1 * self._normal(self.channels) for _ in range(2))
        weight = torch.linalg.qr(self._normal(self.channels, self.channels))[0]
        parameters = {"bias": bias, "logs": logs, "weight": weight}
        return {name: value.to(self._device) for name, value in parameters.items()}

    def cotangents(self) -> tuple[Tensor, Tensor]:
        """Gradients that arrive at y and logdet."""
        return self.state(), self._normal(self.shape.size[0]).to(self._device)

    def _image(self, channels: int) -> Tensor:
        batch, _, height, width = self.shape.size
        return self._normal(batch, channels, height, width).to(self._device).contiguous(memory_format=self._layout)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)


@dataclass(frozen=True)
class Operator:
    """How to call an operator: its tensors by name, the state first, and what its backward pass has to read of them.

    changed     of C channels of the state, how many are not merely copied; the others need no saved state
    at_splits   whether it exists only where a level ends in a split
    """

    inputs: Callable[[Draw], dict[str, Tensor]]
    changed: Callable[[Shape], int] = lambda shape: shape.size[1]
    at_splits: bool = False

    def shapes(self, uses: Iterable[str]) -> list[Shape]:
        """The distinct shapes at which models use the operator, each with all its users."""
        merged: dict[tuple, Shape] = {}
        for shape in (shape for name in uses for shape in level_shapes(name)):
            if self.at_splits and not shape.split:
                continue
            key = (shape.size, shape.training, shape.split if self.at_splits else 0)
            users = merged[key].used_by if key in merged else ()
            merged[key] = replace(shape, used_by=users + shape.used_by)
        return list(merged.values())

    def bytes_moved(self, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...], shape: Shape, backward: bool) -> int:
        """Bytes no implementation can avoid moving.

        forward, inverse   each input read once, each output written once
        backward           the gradients of the outputs and the saved inputs read once (of the state only the changed
                           channels), the gradients of the inputs written once
        """
        state, *others = (tensor.nbytes for tensor in inputs.values())
        every_input, every_output = state + sum(others), sum(tensor.nbytes for tensor in outputs)
        if not backward:
            return every_input + every_output
        saved = state * self.changed(shape) // shape.size[1] + sum(others)
        return every_output + saved + every_input


def _coupled(channels: int) -> int:
    """Channels a coupling changes."""
    return channels - channels // 2


OPERATORS = {
    "actnorm_invconv": Operator(lambda draw: {"x": draw.state(), **draw.actnorm_invconv()}),
    "affine_injector": Operator(lambda draw: {"z": draw.state(), "h": draw.network(draw.channels)}),
    "affine_coupling": Operator(
        lambda draw: {"z": draw.state(), "h": draw.network(_coupled(draw.channels))},
        changed=lambda shape: _coupled(shape.size[1]),
    ),
    "gaussian_split": Operator(
        lambda draw: {"z": draw.state(), "h": draw.network(draw.shape.split)},
        changed=lambda shape: shape.split,
        at_splits=True,
    ),
    "flow_step": Operator(
        lambda draw: {
            "z": draw.state(),
            "h_coupling": draw.network(_coupled(draw.channels)),
            **draw.actnorm_invconv(),
            "h_injector": draw.network(draw.channels),
        }
    ),
}
