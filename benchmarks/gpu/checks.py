"""Right or wrong: kernels beside float64, alone and in graphs and streams; the engine beside the plain path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast import ops
from ncsr_fast.benchmarks.arms import LADDER, Arm, Ours, Task, draw_latents
from ncsr_fast.benchmarks.end_to_end import differences, disagreements
from ncsr_fast.benchmarks.harness import REFERENCE, Case, fault, rounded
from ncsr_fast.benchmarks.registry import LAYOUTS, OPERATORS, Draw, Shape
from ncsr_fast.engine import EngineOptions

from .session import Session

_BATCH, _SIDE = 2, 16


def kernels(session: Session) -> None:
    """Each operator, both ways, with all gradients, on each backend there is; then in a graph, and on another stream."""
    backends = session.backends()
    for backend in backends:
        for channels in session.sizes.channels:
            session.part(f"{backend}, {channels} channels", _operators_are_right, session, backend, channels)
    for backend in backends:
        if backend != REFERENCE:
            session.part(f"{backend} in a captured graph", _same_in_a_graph, session, backend)
            session.part(f"{backend} on a second stream", _same_on_a_stream, session, backend)


def _operators_are_right(session: Session, backend: str, channels: int) -> dict[str, Any]:
    shape = Shape((_BATCH, channels, _SIDE, _SIDE), channels // 2, True, ("check",))
    cases = [
        Case(operator, inverse, shape, dtype, layout, session.device)
        for operator in OPERATORS
        if operator in ops.OPERATORS
        for inverse in (False, True)
        for dtype, layout in (("float32", "channels-last"), ("mixed", "channels-last"), ("float32", "NCHW"))
    ]
    faults = [found for case in cases if (found := fault(case, backend, case.function(backend)))]
    if faults:
        raise ValueError("\n".join(faults))
    return {"cases": len(cases)}


def _inputs(session: Session, operator: str, dtype: str = "float32") -> dict[str, Tensor]:
    channels = session.sizes.channels[0]
    shape = Shape((_BATCH, channels, _SIDE, _SIDE), channels // 2, False, ("check",))
    return OPERATORS[operator].inputs(Draw(shape, dtype, next(iter(LAYOUTS)), session.device))


def _same_in_a_graph(session: Session, backend: str) -> dict[str, Any]:
    """Bit for bit, and with the numbers that lie in the inputs when the graph is replayed."""
    for operator in ("affine_coupling", "affine_injector", "gaussian_split"):  # those that fold nothing in float64
        inputs = _inputs(session, operator)
        call = _call(operator, inputs, backend)
        with torch.no_grad():
            replay = session.captured(call)
            for tensor in inputs.values():
                tensor.mul_(0.5)
            _check_equal(operator, replay(), call())
    return {}


def _same_on_a_stream(session: Session, backend: str) -> dict[str, Any]:
    with torch.no_grad():
        for operator in ("affine_coupling", "flow_step"):
            call = _call(operator, _inputs(session, operator), backend)
            expected = call()
            if session.device == "cuda":
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found = call()
                torch.cuda.current_stream().wait_stream(stream)
            else:
                found = call()
            _check_equal(operator, found, expected)
    return {}


def _call(operator: str, inputs: dict[str, Tensor], backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: getattr(ops, operator)(**inputs, backend=backend)


def _check_equal(operator: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for what, value, other in zip(("y", "logdet"), found, expected):
        if not torch.equal(value, other):
            raise ValueError(f"{operator}: {what} is off by {float((value - other).abs().max()):.1e}")


def engine(session: Session) -> None:
    """The fused engine in each precision beside the plain path in float32: NLL, gradients, decoded images, round trip."""
    model = session.model()
    train, decode = Task("train", 2, session.sizes.check_lr), Task("decode", 2, session.sizes.check_lr, n=1)
    latents = draw_latents(decode, model, session.device)
    plain = Ours(model, *LADDER["plain"])
    plain.train_encoder(True)
    expected: dict[str, Tensor] = {}
    for task in (train, decode):
        expected |= Arm(plain, task, session.device, latents).results()
    for precision in ("fp32", "tf32", "bf16"):
        for checkpoint in (True, False):
            ours = Ours(model, EngineOptions(precision=precision, checkpoint=checkpoint))
            name = f"ncsr_fast, {precision}"
            part = precision if checkpoint else f"{precision}, checkpoint=False"
            session.part(part, _agrees, session, name, ours, train, decode, latents, expected)


def _agrees(
    session: Session, name: str, ours: Ours, train: Task, decode: Task, latents: list[Tensor], expected: dict[str, Tensor]
) -> dict[str, Any]:
    found: dict[str, Tensor] = {}
    for task in (train, decode):
        found |= Arm(ours, task, session.device, latents).results()
    errors = differences(found, expected)
    if texts := disagreements(name, errors, tf32=False):
        raise ValueError("; ".join(texts))
    errors["round_trip"] = ours.round_trip(Arm(ours, train, session.device, latents))
    return {what: rounded(error) for what, error in errors.items()}
