"""One case: results checked first, then every arm (ours, the reference, the compiled reference, a copy) timed in turn."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ncsr_fast import ops

from .registry import OPERATORS, Draw, Shape

REFERENCE, COMPILED, COPY = "reference", "torch.compile", "copy"
DIRECTIONS = ("forward", "inverse", "backward", "inverse-backward")  # a backward is the backward pass alone

_BATCH_SECONDS = 1e-3  # calls are timed in batches this long on a CPU, thousands of times the timer's resolution
_FLUSH_BYTES = 256 * 2**20  # written between two calls on a GPU, several times its L2 cache
_MOST_ROUNDS = 200

Function = Callable[..., tuple[Tensor, Tensor]]  # of the input tensors, by name


@dataclass(frozen=True)
class Case:
    """One operator, or its inverse, on one input. Gradients are recorded where the model at this shape is trained."""

    operator: str
    inverse: bool
    shape: Shape
    dtype: str
    layout: str
    device: str

    def __str__(self) -> str:
        return f"{self.operator}{' inverse' * self.inverse}, {self.shape} {self.layout} {self.dtype}"

    @property
    def directions(self) -> tuple[str, ...]:
        directions = DIRECTIONS[self.inverse :: 2]
        return directions if self.shape.training else directions[:1]

    def draw(self) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Inputs by name, and the gradients that arrive at y and logdet."""
        draw = Draw(self.shape, self.dtype, self.layout, self.device)
        inputs = OPERATORS[self.operator].inputs(draw)
        return {name: tensor.requires_grad_(self.shape.training) for name, tensor in inputs.items()}, draw.cotangents()

    def function(self, backend: str) -> Function:
        operator = getattr(ops, self.operator)
        return lambda **inputs: operator(**inputs, inverse=self.inverse, backend=backend)


def wrong_results(case: Case, functions: dict[str, Function]) -> list[str]:
    """What is wrong with the value, the log-determinant or a gradient of each function, one line each.

    The measure is the float64 reference on the same inputs. A function may be twice as far from it as the reference in
    the case's own dtype, plus a few roundings of the largest magnitude. Where n elements are summed, n^¼ times as many:
    the error of a random walk through each of two stages of √n sums.
    """
    inputs, cotangents = case.draw()
    # these first: nothing right has lain yet in the memory an unwritten element would show
    found = {name: _results(function, inputs, cotangents) for name, function in functions.items()}
    rounded = _results(case.function(REFERENCE), inputs, cotangents)
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    exact = _results(case.function(REFERENCE), wide, tuple(tensor.double() for tensor in cotangents))
    complaints = []
    for name, results in found.items():
        for what, value in results.items():
            expected = exact[what]
            summed = max(1, math.prod(case.shape.size) // max(1, expected.numel()))
            roundings = 4 * summed**0.25 * torch.finfo(value.dtype).eps * _largest(expected)
            allowed = 2 * _largest(rounded[what] - expected) + roundings
            if (value.shape, value.dtype) != (expected.shape, rounded[what].dtype):
                complaints.append(f"{case}, {name}: {what} has shape {tuple(value.shape)} and dtype {value.dtype}")
            elif not (error := _largest(value - expected)) <= allowed:  # NaN included
                complaints.append(f"{case}, {name}: {what} is wrong by {error:.1e}, allowed {allowed:.1e}")
    return complaints


def _results(function: Function, inputs: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    training = next(iter(inputs.values())).requires_grad
    with torch.set_grad_enabled(training):
        outputs = function(**inputs)
    results = {"y": outputs[0].detach(), "logdet": outputs[1].detach()}
    if training:
        gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
        results |= {f"the gradient of {name}": gradient for name, gradient in zip(inputs, gradients)}
    return results


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def measure(
    case: Case, backends: list[str], directions: list[str], with_compile: bool, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """The rows of a case whose results were found right: one for every direction and arm. They lack the provenance."""
    inputs, cotangents = case.draw()
    functions = {name: case.function(name) for name in dict.fromkeys([*backends, REFERENCE])}
    if with_compile:
        functions[COMPILED] = _compiled(case)
    rows = []
    for direction in (direction for direction in case.directions if direction in directions):
        backward = direction.endswith("backward")
        with torch.set_grad_enabled(case.shape.training):
            arms = {name: _call(function, inputs, cotangents, backward) for name, function in functions.items()}
            moved = OPERATORS[case.operator].bytes_moved(inputs, cotangents, case.shape, backward)
            source = torch.ones(moved // 2, dtype=torch.uint8, device=case.device)  # read once and written once
            times = side_by_side({**arms, COPY: _copy(source)}, case.device, seconds, rounds)
            peaks = {name: peak_bytes(arm, case.device) for name, arm in arms.items()}
        copy = statistics.median(times[COPY])
        for name in arms:
            low, median, high = quantiles(times[name])
            rows.append(
                {
                    "operator": case.operator,
                    "backend": name,
                    "direction": direction,
                    "shape": list(case.shape.size),
                    "dtype": case.dtype,
                    "layout": case.layout,
                    "used_by": list(case.shape.used_by),
                    "gradients_recorded": case.shape.training,
                    "median_ms": rounded(1e3 * median),
                    "p20_ms": rounded(1e3 * low),
                    "p80_ms": rounded(1e3 * high),
                    "rounds": len(times[name]),
                    "bytes": moved,
                    "gb_per_s": rounded(1e-9 * moved / median),
                    "share_of_copy": rounded(copy / median),
                    "peak_bytes": peaks[name],
                }
            )
    return rows


def _call(
    function: Function, inputs: dict[str, Tensor], cotangents: tuple[Tensor, Tensor], backward: bool
) -> Callable[[], Any]:
    if not backward:
        return lambda: function(**inputs)
    outputs, leaves = function(**inputs), list(inputs.values())
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _copy(source: Tensor) -> Callable[[], Any]:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _compiled(case: Case) -> Function:
    """The reference under torch.compile for this case alone, compiled and found right."""
    torch._dynamo.reset()  # so that no call pays for the guards of earlier shapes, or meets the limit of recompilations
    if hasattr(torch._functorch.config, "donated_buffer"):  # came with torch 2.6; its backward could be called only once
        torch._functorch.config.donated_buffer = False
    function = torch.compile(case.function(REFERENCE), dynamic=False)
    try:
        complaints = wrong_results(case, {COMPILED: function})
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"torch.compile of the reference failed, --no-compile leaves it out: {reason}") from error
    if complaints:
        raise ValueError(complaints[0])
    return function


def side_by_side(
    arms: dict[str, Callable[[], Any]], device: str, seconds: float, rounds: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of one call of every arm in each of at least `rounds` rounds, and as many more as fit into `seconds`.

    The arms take turns within a round, and another one begins the next: what disturbs the machine disturbs all alike.
    """
    elapsed = _cuda_timer(device) if torch.device(device).type == "cuda" else _cpu_seconds
    calls = {}
    for name, arm in arms.items():
        for _ in range(warm_up):
            arm()
        calls[name] = math.ceil(_BATCH_SECONDS / elapsed(arm, 1))
    times: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    started = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= rounds and time.perf_counter() - started > seconds:
            break
        for name in order:
            times[name].append(elapsed(arms[name], calls[name]))
        order.append(order.pop(0))
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 20 % quantile, the median and the 80 % quantile."""
    low, high = (sorted(times)[round(share * (len(times) - 1))] for share in (0.2, 0.8))
    return low, statistics.median(times), high


def _cpu_seconds(call: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def _cuda_timer(device: str) -> Callable[[Callable[[], Any], int], float]:
    """Time of one call by events, with a cold L2 cache. The flush also hides the host's work up to its own duration."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def elapsed(call: Callable[[], Any], calls: int) -> float:
        del calls  # one: events resolve half a microsecond
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return elapsed


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most memory that tensors took during a call, its results included, beyond what they took before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some versions of the profiler write to stderr at every use
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = call()  # kept, so that its memory is not returned before the end
    del results
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    now = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def rounded(value: float) -> float:
    return float(f"{value:.4g}")
