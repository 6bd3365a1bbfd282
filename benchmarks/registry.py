"""The cases that are measured: every operator, on the inputs it has in a model, at the shapes it has there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

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
    """The first tensor of a call: the state inside a level, an image that is convolved, or a stack of matrices."""

    size: tuple[int, ...]  # (B, C, H, W), or (N, C, C)
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


def image_shapes(name: str, channels: int) -> list[Shape]:
    """An image of so many channels at the LR resolution of the model of `USES[name]`."""
    use = USES[name]
    return [Shape((use.batch, channels, *use.lr), 0, use.training, (f"{name} LR",))]


def matrix_shapes(name: str) -> list[Shape]:
    """The 1×1 convolutions of the steps of a level, of all levels, in the model of `USES[name]`."""
    config = NCSRConfig.preset(USES[name].preset)
    count = config.steps + config.transition_steps
    return [replace(shape, size=(count, shape.size[1], shape.size[1]), split=0) for shape in level_shapes(name)]


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
        """The output of a network for `channels` channels: interleaved pairs, of a magnitude it has in a trained model."""
        return (0.5 * self._image(2 * channels)).to(self._network_dtype)

    def features(self, channels: int, factor: int = 1) -> Tensor:
        """An image in the dtype of networks, `factor` times as high and wide."""
        return self._image(channels, factor).to(self._network_dtype)

    def weight(self, outputs: int, inputs: int, side: int) -> Tensor:
        """The weight of a k×k convolution whose results are as large as its inputs."""
        return (self._normal(outputs, inputs, side, side) / (side * inputs**0.5)).to(self._device)

    def bias(self, outputs: int) -> Tensor:
        return (0.1 * self._normal(outputs)).to(self._device)

    def actnorm_invconv(self, *stack: int) -> dict[str, Tensor]:
        """bias, logs and weight, the weight a rotation as at initialisation; a stack of them."""
        bias, logs = (0.1 * self._normal(*stack, self.channels) for _ in range(2))
        weight = torch.linalg.qr(self._normal(*stack, self.channels, self.channels))[0]
        parameters = {"bias": bias, "logs": logs, "weight": weight}
        return {name: value.to(self._device) for name, value in parameters.items()}

    def cotangents(self) -> tuple[Tensor, ...]:
        """Gradients that arrive at y and logdet."""
        return self.state(), self._normal(self.shape.size[0]).to(self._device)

    def stack_cotangents(self, *dims: int) -> tuple[Tensor, ...]:
        """Gradients that arrive at stacks of matrices (2), vectors (1) and numbers (0), float64."""
        sizes = [(self.shape.size[0], *[self.channels] * each) for each in dims]
        return tuple(self._normal(*size).double().to(self._device) for size in sizes)

    def _image(self, channels: int, factor: int = 1) -> Tensor:
        batch, _, height, width = self.shape.size
        image = self._normal(batch, channels, factor * height, factor * width)
        return image.to(self._device).contiguous(memory_format=self._layout)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)


@dataclass(frozen=True)
class Operator:
    """How to call an operator: its tensors by name, and what its backward pass has to read of them.

    Args:
        inputs: The tensors, the one first whose shape it is.
        changed: Of C channels of the state, how many are not merely copied; the others need no saved state.
        at_splits: Whether it exists only where a level ends in a split.
        function: Its name in `ncsr_fast.ops`; empty: the one it has here.
        options: Other arguments.
        decisive: The name of the tensor whose dtype decides which backends have it; empty: the first one.
        uses: Its shapes in the model of a use.
        outputs: Names of the outputs.
        cotangents: Gradients that arrive at the outputs.
        invertible: Whether it has an argument `inverse`.
        of_images: False: it has one dtype and layout, float32 matrices.
        enlarged: By how much an algorithm, which need not be the reference's, enlarges the rounding errors of sums.
    """

    inputs: Callable[[Draw], dict[str, Tensor]]
    changed: Callable[[Shape], int] = lambda shape: shape.size[1]
    at_splits: bool = False
    function: str = ""
    options: Mapping[str, bool] = field(default_factory=dict)
    decisive: str = ""
    uses: Callable[[str], list[Shape]] = level_shapes
    outputs: tuple[str, ...] = ("y", "logdet")
    cotangents: Callable[[Draw], tuple[Tensor, ...]] = Draw.cotangents
    invertible: bool = True
    of_images: bool = True
    enlarged: Callable[[Shape], float] = lambda shape: 1.0

    def shapes(self, uses: Iterable[str]) -> list[Shape]:
        """The distinct shapes at which models use the operator, each with all its users."""
        merged: dict[tuple, Shape] = {}
        for shape in (shape for name in uses for shape in self.uses(name)):
            if self.at_splits and not shape.split:
                continue
            key = (shape.size, shape.training, shape.split if self.at_splits else 0)
            users = merged[key].used_by if key in merged else ()
            merged[key] = replace(shape, used_by=users + shape.used_by)
        return list(merged.values())

    def bytes_moved(self, inputs: dict[str, Tensor], outputs: tuple[Tensor, ...], shape: Shape, backward: bool) -> int:
        """Bytes no implementation can avoid moving.

        Forward and inverse: each input read once, each output written once. Backward: the gradients of the outputs and the
        saved inputs read once (of the state only the changed channels), the gradients of the inputs written once.
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


def _by_winograd(_: Shape) -> float:
    """F(4×4, 3×3) enlarges rounding errors by up to 24.5/3 (tests/native/test_conv3x3.py)."""
    return 24.5 / 3


def _by_elimination(shape: Shape) -> float:
    """By the condition number in the ∞-norm, of a rotation C at most (Higham, Accuracy and Stability, 14.1)."""
    return float(shape.size[1])


def _convolution(inputs: int, outputs: int, **options: bool) -> Operator:
    """The entry of a convolution of LR images."""
    factor = 2 if options else 1
    return Operator(
        lambda draw: {"x": draw.features(inputs), "weight": draw.weight(outputs, inputs, 3), "bias": draw.bias(outputs)},
        function="conv3x3",
        options=options,
        uses=lambda name: image_shapes(name, inputs),
        outputs=("y",),
        cotangents=lambda draw: (draw.features(outputs, factor),),
        invertible=False,
        enlarged=_by_winograd,
    )


def _network_inputs(draw: Draw) -> dict[str, Tensor]:
    """The inputs of a coupling's network: it reads the pass-through channels and has an output pair for each of the others."""
    outputs = 2 * _coupled(draw.channels)
    return {
        "z1": draw.state()[:, : draw.channels // 2], "pre": draw.features(HIDDEN),
        "w1": draw.weight(HIDDEN, draw.channels // 2, 3), "w2": draw.weight(HIDDEN, HIDDEN, 1), "b2": draw.bias(HIDDEN),
        "w3": draw.weight(outputs, HIDDEN, 3), "b3": draw.bias(outputs),
    }  # fmt: skip


HIDDEN = 64
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
    "conv3x3 64→64": _convolution(64, 64),  # of the encoder, and upsample2x of its last layers
    "conv3x3 64→64 upsample2x": _convolution(64, 64, upsample2x=True),
    "conv3x3 320→64": _convolution(320, 64),  # of the features that a level's networks read, hoisted
    "step_network": Operator(
        _network_inputs,
        function="step_network",
        decisive="pre",
        outputs=("h",),
        cotangents=lambda draw: (draw.features(2 * _coupled(draw.channels)),),
        invertible=False,
        enlarged=_by_winograd,  # the gradients
    ),
    "fold": Operator(
        lambda draw: draw.actnorm_invconv(draw.shape.size[0]),
        uses=matrix_shapes,
        outputs=("mix", "offset", "logdet"),
        cotangents=lambda draw: draw.stack_cotangents(2, 1, 0),
        of_images=False,
        enlarged=_by_elimination,
    ),
    "inverse_logdet": Operator(
        lambda draw: {"weight": 1.1 * draw.actnorm_invconv(draw.shape.size[0])["weight"]},  # log|det| of a rotation is rounding
        uses=matrix_shapes,
        outputs=("inverse", "logdet"),
        cotangents=lambda draw: draw.stack_cotangents(2, 0),
        invertible=False,
        of_images=False,
        enlarged=_by_elimination,
    ),
}


def functions() -> dict[str, list[str]]:
    """The entries of every function of `ncsr_fast.ops`, by its name."""
    found: dict[str, list[str]] = {}
    for name, operator in OPERATORS.items():
        found.setdefault(operator.function or name, []).append(name)
    return found
