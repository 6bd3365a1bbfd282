"""Rates: what the device can do, what cuDNN's convolutions of the model do of it, and the operators' share of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ncsr_fast.benchmarks.harness import Case, measure, rounded
from ncsr_fast.benchmarks.provenance import provenance
from ncsr_fast.benchmarks.registry import OPERATORS, Draw, Shape, level_shapes
from ncsr_fast.ops.backend import kernels, resolve_backend

from .session import Session

_LAUNCHES = 1000


def ceilings(session: Session) -> None:
    """Limits of the device: bandwidth of a copy, rate of a large product, time of a launch in a graph."""
    session.part("machine", lambda: provenance(session.device) | {"command": session.setup.command})
    session.part("copy", _copy, session)
    session.part("bf16 product", _product, session)
    session.part("launch", _launch, session)


def _copy(session: Session) -> dict[str, Any]:
    source = torch.randint(256, (session.sizes.copied,), dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    seconds = session.seconds(lambda: target.copy_(source))["median_s"]
    return {"gb_per_s": rounded(2e-9 * source.numel() / seconds)}


def _product(session: Session) -> dict[str, Any]:
    size = session.sizes.product
    a, b = (session.random(size, size, seed=seed).bfloat16() for seed in range(2))
    seconds = session.seconds(lambda: a @ b)["median_s"]
    return {"tflop_per_s": rounded(2e-12 * size**3 / seconds)}


def _launch(session: Session) -> dict[str, Any]:
    """Time of the smallest kernel, launched one after the other in a graph, and from Python."""
    x = torch.zeros(1, device=session.device)

    def call() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1)

    replay = session.captured(call)
    times = {"graph_us": session.seconds(replay)["median_s"], "eager_us": session.seconds(call)["median_s"]}
    return {name: rounded(1e6 * seconds / _LAUNCHES) for name, seconds in times.items()}


@dataclass(frozen=True)
class Convolution:
    """One of the model's, at the batch and crop of training; `level` 0 works at the LR size, level 1 at twice that."""

    inputs: int
    outputs: int
    kernel: int
    level: int

    def __str__(self) -> str:
        return f"{self.inputs}→{self.outputs}, {self.kernel}×{self.kernel}, {'HR/2' if self.level else 'LR'}"


CONVOLUTIONS = (
    *(Convolution(inputs, 64, 3, 1) for inputs in (6, 8, 12, 16)),
    *(Convolution(64, outputs, 3, 1) for outputs in (12, 16, 24)),
    Convolution(64, 64, 1, 1),
    *(Convolution(inputs, 32, 3, 0) for inputs in (64, 96, 128, 160)),
    Convolution(192, 64, 3, 0),
    Convolution(64, 2048, 3, 0),
    *(Convolution(256, 2048, kernel, 0) for kernel in (1, 2)),
    Convolution(320, 2048, 3, 0),
)


def convolutions(session: Session) -> None:
    """cuDNN in bf16, channels-last: forward, and the gradients of input and weight; with and without its search."""
    for search in (False, True):
        torch.backends.cudnn.benchmark = search
        for convolution in CONVOLUTIONS[: 1 if session.setup.dry else None]:
            name = f"{convolution}{', cudnn.benchmark' * search}"
            session.part(name, _convolution, session, convolution)


def _convolution(session: Session, convolution: Convolution) -> dict[str, Any]:
    size = session.sizes.lr << convolution.level
    last = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x = session.random(session.sizes.batch, convolution.inputs, size, size).to(**last)
    weight = session.random(convolution.outputs, convolution.inputs, convolution.kernel, convolution.kernel).to(**last)
    padding = convolution.kernel // 2
    y = torch.nn.functional.conv2d(x, weight, padding=padding)
    gradient = torch.rand_like(y)

    def backward(*wanted: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [*wanted, False]
        )

    calls = {
        "forward": lambda: torch.nn.functional.conv2d(x, weight, padding=padding),
        "input": backward(True, False),
        "weight": backward(False, True),
    }
    figures: dict[str, Any] = {}
    flops = 2 * y.numel() * convolution.inputs * convolution.kernel**2
    for name, call in calls.items():
        seconds = session.device_seconds(call, rounds=3)
        figures |= {f"{name}_us": rounded(1e6 * seconds), f"{name}_tflop_per_s": rounded(1e-12 * flops / seconds)}
    return figures


def operators(session: Session) -> None:
    """Our operators as they are called, and the step kernel on folded parameters, as the engine calls it."""
    for use in ("quick",) if session.setup.dry else ("x4-train", "div2k"):
        for shape in level_shapes(use):
            for dtype in ("float32", "mixed"):
                session.part(f"step kernel, {shape}, {dtype}", _step_kernel, session, shape, dtype)
        for name in ("flow_step", "affine_coupling", "affine_injector", "gaussian_split", "actnorm_invconv"):
            for shape in OPERATORS[name].shapes([use])[: 1 if session.setup.dry else None]:
                for inverse in (False, True):
                    case = Case(name, inverse, shape, "mixed", "channels-last", session.device)
                    session.part(str(case), _operator, session, case)


def _operator(session: Session, case: Case) -> dict[str, Any]:
    rows = measure(case, {name: case.function(name) for name in session.backends()}, case.directions, 0.0, 5)
    if errors := [row["error"] for row in rows if "error" in row]:
        raise RuntimeError("\n".join(errors))
    return {
        f"{row['direction']}, {row['backend']}": {key: row[key] for key in ("median_ms", "gb_per_s", "share_of_copy")}
        for row in rows
    }


def _step_kernel(session: Session, shape: Shape, dtype: str) -> dict[str, Any]:
    """Forward, and backward where the shape is one of training, with inputs in turn that do not fit the L2 cache together."""
    channels, inverse = shape.size[1], not shape.training
    draw = Draw(shape, dtype, "channels-last", session.device)
    x, coupling, injector = draw.state(), draw.network(channels - channels // 2), draw.network(channels)
    affines = (injector, coupling) if inverse else (coupling, injector)  # ahead of the matrix, and behind it
    parameters = draw.actnorm_invconv()
    mix, offset = parameters["weight"].contiguous(), parameters["bias"]
    backend = resolve_backend("flow_step", "auto", x)
    module = kernels(backend)
    bytes_moved = 2 * x.nbytes + coupling.nbytes + injector.nbytes
    copies = min(20, 1 + 2**28 // bytes_moved)
    inputs = [[tensor.clone() for tensor in (x, *affines)] for _ in range(copies)]

    def forward(x: Any, before: Any, after: Any) -> Callable[[], Any]:
        return lambda: module.flow_step_forward(x, mix, offset, before, after, 1e-4, inverse)

    figures: dict[str, Any] = {"backend": backend}
    with torch.no_grad():
        seconds = session.device_seconds(*(forward(*tensors) for tensors in inputs))
        figures |= {"forward_us": rounded(1e6 * seconds), "forward_gb_per_s": rounded(1e-9 * bytes_moved / seconds)}
        if shape.training:
            dy, dlogdet = draw.cotangents()
            y = forward(x, *affines)()[0]

            def backward(x: Any, before: Any, after: Any) -> Callable[[], Any]:
                return lambda: module.flow_step_backward(dy, dlogdet, x, y, mix, before, after, 1e-4, inverse)

            seconds = session.device_seconds(*(backward(*tensors) for tensors in inputs))
            moved = bytes_moved + 2 * x.nbytes + coupling.nbytes + injector.nbytes
            figures |= {"backward_us": rounded(1e6 * seconds), "backward_gb_per_s": rounded(1e-9 * moved / seconds)}
    return figures
