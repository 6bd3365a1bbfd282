"""Measurements of `ncsr-fast tune`: backends and tiles of every kernel on this GPU, and its table (`ncsr_fast.tuning`).

Tiles come first, each kernel's on its own; backends are then compared in the best ones. A candidate counts with the sum of its
medians over all shapes, directions and operators of a kernel; one that fails, or whose results are wrong, is out. What measures
is `harness`: results checked, warmed up, CUDA graphs of several calls, events, medians, taking turns.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ncsr_fast import ops, tuning
from ncsr_fast.ops.backend import BACKENDS, forget, kernel_of

from .harness import REFERENCE, Case, Function, fault, measure
from .provenance import installed_version
from .registry import OPERATORS

USES, QUICK = ("x4-train", "x8-train", "div2k"), ("x4-train",)  # the shapes, all of them and with --quick
DTYPES = ("float32", "bfloat16")
LAYOUT = "channels-last"  # the engine's
SECONDS, ROUNDS = 0.1, 10  # of a case: at least so many rounds, and as many more as fit
FAILED = math.inf
# Kernels that run on a GPU however fast they are, and why
NEEDED = {"inverse_logdet": "PyTorch's makes the host wait, so that no CUDA graph can hold it"}

Times = dict[str, float]  # seconds by candidate; FAILED for one that cannot be used
Measure = Callable[[Case, dict[str, Function], str], Times]


@dataclass(frozen=True)
class Tiling:
    """A Triton kernel whose tiles are to be chosen.

    Attributes:
        operators: Those that run it, of which the first with a shape is measured.
        backward: True for one of the backward pass.
        candidates: Sizes; those that a candidate lacks are the kernel's own, and what does not compile is out.
    """

    operators: tuple[str, ...]
    backward: bool
    candidates: tuple[dict[str, int], ...]


def _product(**sizes: Sequence[int]) -> tuple[dict[str, int], ...]:
    found: list[dict[str, int]] = [{}]
    for name, values in sizes.items():
        found = [{**each, name: value} for each in found for value in values]
    return tuple(found)


_ELEMENTWISE = _product(TILE=(256, 512, 1024, 2048), num_warps=(2, 4, 8))
# with 3 programs of 4 warps on a multiprocessor, or 2 of 8, by the registers that a thread may have
_STEP = _product(BLOCK_P=(16, 32, 64, 128), num_warps=(4,), maxnreg=(168,))
_STEP += _product(BLOCK_P=(16, 32, 64, 128), num_warps=(8,), maxnreg=(128,))
TILINGS = {  # by the name under which a kernel asks for its tiles
    "elementwise_forward": Tiling(("affine_injector",), False, _ELEMENTWISE),
    "elementwise_backward": Tiling(("affine_injector",), True, _ELEMENTWISE),
    "flow_step_forward": Tiling(("flow_step",), False, _STEP),
    "flow_step_backward": Tiling(("flow_step",), True, _STEP),
    "flow_step_backward_weight": Tiling(("flow_step",), True, _product(BLOCK_P=(16, 32, 64), num_stages=(1, 2, 3))),
    "inverse_logdet": Tiling(("inverse_logdet",), False, _product(num_warps=(1, 2, 4, 8, 16))),
}


def medians(case: Case, functions: dict[str, Function], direction: str) -> Times:
    """The median seconds of each function in a direction; FAILED where it raises, or where its results are wrong."""
    wrong = {name: fault(case, name, function) for name, function in functions.items()}
    right = {name: function for name, function in functions.items() if not wrong[name]}
    rows = measure(case, right, [direction], SECONDS, ROUNDS)
    found = {row["backend"]: 1e-3 * row["median_ms"] if "median_ms" in row else FAILED for row in rows}
    return {name: found.get(name, FAILED) for name in functions}


def table_of(
    gpu: tuning.Gpu,
    file: Path,
    device: str = "cuda",
    uses: Sequence[str] = USES,
    measured: Measure = medians,
    say: Callable[[str], None] = print,
) -> tuning.Table:
    """The table of a GPU, measured.

    Args:
        gpu: The GPU.
        file: Where the table is to be written.
        device: The device of the tensors.
        uses: Names of `registry.USES`, whose shapes are measured.
        measured: (case, functions by name, direction) → the seconds of each.
        say: Told of every result in a line.
    """
    provenance = {
        "kind": "measured",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": installed_version("triton") or "none",
        "gpu": gpu.name,
    }
    with _by_default(), ExitStack() as chosen:
        tiles: list[tuning.Tiles] = []
        if ops.backends(device)["triton"].available:
            tiles = [entry for name in TILINGS for entry in _tiles(name, device, uses, measured, provenance, say)]
        for entry in tiles:
            chosen.enter_context(tuning.trying(entry.kernel, entry.channels, entry.sizes))
        choices = [entry for kernel in _kernels() for entry in _choices(kernel, device, uses, measured, provenance, say)]
    return tuning.Table(file, gpu.name, gpu.capability, tuple(choices), tuple(tiles))


# ---- tiles


def _tiles(
    name: str, device: str, uses: Sequence[str], measured: Measure, provenance: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[tuning.Tiles]:
    """The best tiles of a kernel, for each bucket of channels that the shapes have."""
    tiling = TILINGS[name]
    buckets: dict[int, list[Case]] = {}
    for case in _cases(tiling.operators, "float32", device, uses):
        buckets.setdefault(tuning.bucket(case.shape.size[1]), []).append(case)
    for channels, cases in buckets.items():
        directions = [(case, direction) for case in cases for direction in _directions(case, tiling.backward)]
        own = _seconds(name, channels, {}, directions, measured)
        times = [_seconds(name, channels, sizes, directions, measured) for sizes in tiling.candidates]
        best = min(range(len(times)), key=times.__getitem__)
        sizes, seconds = (tiling.candidates[best], times[best]) if times[best] < own else ({}, own)
        if directions and seconds < FAILED:
            say(f"{name}, up to {channels} channels: {_written(sizes) or 'its own tiles'}, {own / seconds:.2f}× its own")
            yield tuning.Tiles(name, channels, sizes, _rounded(own / seconds) if own < FAILED else None, provenance)


def _seconds(
    name: str, channels: int, sizes: Mapping[str, int], directions: Sequence[tuple[Case, str]], measured: Measure
) -> float:
    """The sum of the medians of cases in tiles of these sizes; the kernel's own where there are none."""
    total = 0.0
    with tuning.trying(name, channels, sizes):  # around the backward pass too
        for case, direction in directions:
            label = _written(sizes) or "own"
            total += measured(case, {label: case.function("triton")}, direction)[label]
            if total == FAILED:
                break
    return total


def _written(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


# ---- backends


def _kernels() -> list[str]:
    return list(dict.fromkeys(kernel_of(entry.function or name) for name, entry in OPERATORS.items()))


def _choices(
    kernel: str, device: str, uses: Sequence[str], measured: Measure, provenance: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[tuning.Choice]:
    """An entry for each dtype and backend of a kernel, the best first."""
    operators = [name for name, entry in OPERATORS.items() if kernel_of(entry.function or name) == kernel]
    any_dtype = not OPERATORS[operators[0]].of_images
    for dtype in DTYPES[:1] if any_dtype else DTYPES:
        names = _available(operators[0], device, dtype)
        if not names:
            continue
        totals = dict.fromkeys((REFERENCE, *names), 0.0)
        for case in _cases(operators, dtype, device, uses):
            for direction in case.directions:
                functions = {name: case.function(name) for name in totals if totals[name] < FAILED}
                for name, seconds in measured(case, functions, direction).items():
                    totals[name] += seconds
        for name in sorted(names, key=totals.__getitem__):
            gain, why = _rounded(totals[REFERENCE] / totals[name]), dict(provenance)
            if totals[name] == FAILED:
                gain, said = 0.0, "fails"
            elif totals[REFERENCE] == FAILED or kernel in NEEDED:
                gain, said = None, NEEDED.get(kernel, "the reference fails")
                why |= {"kind": "established", "note": said}
            else:
                said = f"{gain}× the reference's speed"
            say(f"{kernel}, {dtype}: {name}, {said}")
            yield tuning.Choice(kernel, None if any_dtype else dtype, name, gain, why)


def _available(operator: str, device: str, dtype: str) -> list[str]:
    """The backends beside the reference that have an operator here."""
    like = torch.empty(0, dtype=getattr(torch, dtype), device=device)
    found = []
    for name in BACKENDS:
        try:
            found.append(ops.resolve_backend(OPERATORS[operator].function or operator, name, like))
        except ops.BackendUnavailable:
            continue
    return [name for name in found if name != REFERENCE]


def _cases(operators: Sequence[str], dtype: str, device: str, uses: Sequence[str]) -> list[Case]:
    return [
        Case(name, inverse, shape, dtype, LAYOUT, device)
        for name in operators
        for shape in OPERATORS[name].shapes(uses)
        for inverse in (False, True)[: 1 + OPERATORS[name].invertible]
    ]


def _directions(case: Case, backward: bool) -> list[str]:
    return [direction for direction in case.directions if direction.endswith("backward") == backward]


def _rounded(gain: float) -> float:
    return float(f"{gain:.3g}")


@contextmanager
def _by_default() -> Iterator[None]:
    """A context without tables of this GPU, so that what is measured does not depend on earlier measurements."""
    before = os.environ.get(tuning.MODE)
    os.environ[tuning.MODE] = "default"
    forget()
    try:
        yield
    finally:
        os.environ.pop(tuning.MODE)
        if before is not None:
            os.environ[tuning.MODE] = before
        forget()
