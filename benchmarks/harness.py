"""One case: results checked, and every arm (ours, the reference, the compiled reference, a copy) timed in turn."""

from __future__ import annotations

import contextlib
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

from .registry import OPERATORS, Draw, Operator, Shape

REFERENCE, COMPILED, COPY = "reference", "torch.compile", "copy"
DIRECTIONS = ("forward", "inverse", "backward", "inverse-backward")  # a backward is the backward pass alone

_BATCH_SECONDS = 1e-3  # calls are timed in batches this long on a CPU, thousands of times the timer's resolution
_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of a GPU
CALLS_IN_A_GRAPH = 20
_MOST_ROUNDS = 200

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]  # of the input tensors, by name
Drawn = tuple[dict[str, Tensor], Outputs]  # inputs by name, and the gradients that arrive at the outputs


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
    def entry(self) -> Operator:
        return OPERATORS[self.operator]

    @property
    def directions(self) -> tuple[str, ...]:
        directions = DIRECTIONS[self.inverse :: 2]
        return directions if self.shape.training else directions[:1]

    def draw(self) -> Drawn:
        """Inputs and arriving gradients, the same numbers every time."""
        draw = Draw(self.shape, self.dtype, self.layout, self.device)
        inputs = self.entry.inputs(draw)
        inputs = {name: tensor.requires_grad_(self.shape.training) for name, tensor in inputs.items()}
        return inputs, self.entry.cotangents(draw)

    def function(self, backend: str) -> Function:
        operator = getattr(ops, self.entry.function or self.operator)
        options = dict(self.entry.options) | ({"inverse": self.inverse} if self.entry.invertible else {})

        def outputs(**inputs: Tensor) -> Outputs:
            found = operator(**inputs, **options, backend=backend)
            return found if isinstance(found, tuple) else (found,)

        return outputs


def wrong_results(case: Case, functions: dict[str, Function]) -> list[str]:
    """Complaints about an output or a gradient of each function, one line each.

    The measure is the float64 reference on the same inputs. A function may be twice as far from it as the reference in
    the case's own dtype, plus a few roundings of the largest magnitude. Where n elements are summed, n^¼ times as many:
    the error of a random walk through each of two stages of √n sums. Where the kernels' algorithm enlarges errors, by that.
    """
    inputs, cotangents = case.draw()
    # these first: nothing right has lain yet in the memory an unwritten element would show
    found = {name: _results(case, function, inputs, cotangents) for name, function in functions.items()}
    rounded = _results(case, case.function(REFERENCE), inputs, cotangents)
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    exact = _results(case, case.function(REFERENCE), wide, tuple(tensor.double() for tensor in cotangents))
    complaints = []
    for name, results in found.items():
        for what, value in results.items():
            expected = exact[what]
            summed = max(1, math.prod(case.shape.size) // max(1, expected.numel()))
            roundings = 4 * case.entry.enlarged(case.shape) * summed**0.25 * torch.finfo(value.dtype).eps * _largest(expected)
            allowed = 2 * _largest(rounded[what] - expected) + roundings
            if (value.shape, value.dtype) != (expected.shape, rounded[what].dtype):
                complaints.append(f"{case}, {name}: {what} has shape {tuple(value.shape)} and dtype {value.dtype}")
            elif not (error := _largest(value - expected)) <= allowed:  # NaN included
                complaints.append(f"{case}, {name}: {what} is wrong by {error:.1e}, allowed {allowed:.1e}")
    return complaints


def _results(case: Case, function: Function, inputs: dict[str, Tensor], cotangents: Outputs) -> dict[str, Tensor]:
    training = next(iter(inputs.values())).requires_grad
    with torch.set_grad_enabled(training):
        outputs = function(**inputs)
    results = {name: output.detach() for name, output in zip(case.entry.outputs, outputs, strict=True)}
    if training:
        gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
        results |= {f"the gradient of {name}": gradient for name, gradient in zip(inputs, gradients)}
    return results


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def fault(case: Case, name: str, function: Function) -> str:
    """Complaint about a function of a case whose results are wrong, or that raises; empty where there is none."""
    try:
        return "\n".join(wrong_results(case, {name: function}))
    except Exception as error:
        return f"{case}, {name}: {brief(error)}"


def measure(
    case: Case, functions: dict[str, Function], directions: list[str], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """The rows of functions that were found right: one for every direction and function. They lack the provenance.

    A function that raises has its `error` in place of the figures.
    """
    cuda = torch.device(case.device).type == "cuda"
    rows = []
    with torch.cuda.stream(torch.cuda.Stream(case.device)) if cuda else contextlib.nullcontext():
        draws = _draws(case)
        for direction in (direction for direction in case.directions if direction in directions):
            with torch.set_grad_enabled(case.shape.training):
                rows += _measure_direction(case, functions, direction, draws, seconds, rounds)
    return rows


def _measure_direction(
    case: Case, functions: dict[str, Function], direction: str, draws: list[Drawn], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    inputs, cotangents = draws[0]
    backward = direction.endswith("backward")
    calls, arms, errors = {}, {}, {}
    for name, function in functions.items():
        try:
            calls[name] = [_call(function, *drawn, backward) for drawn in draws]
            calls[name][0]()
            arms[name] = _arm(calls[name], case.device)
        except Exception as error:
            errors[name] = brief(error)
    moved = case.entry.bytes_moved(inputs, cotangents, case.shape, backward)
    sources = [torch.ones(moved // 2, dtype=torch.uint8, device=case.device) for _ in draws]  # read once and written once
    times = side_by_side({**arms, COPY: _arm([_copy(source) for source in sources], case.device)}, case.device, seconds, rounds)
    called = CALLS_IN_A_GRAPH if torch.device(case.device).type == "cuda" else 1
    copy = statistics.median(times[COPY])
    rows = []
    for name in functions:
        if name in errors:
            rows.append(error_row(case, direction, name, errors[name]))
            continue
        low, median, high = (value / called for value in quantiles(times[name]))
        rows.append(
            _identity(case, direction, name)
            | {
                "median_ms": rounded(1e3 * median),
                "p20_ms": rounded(1e3 * low),
                "p80_ms": rounded(1e3 * high),
                "rounds": len(times[name]),
                "bytes": moved,
                "gb_per_s": rounded(1e-9 * moved / median),
                "share_of_copy": rounded(copy / called / median),
                "peak_bytes": peak_bytes(calls[name][0], case.device),
            }
        )
    return rows


def error_row(case: Case, direction: str, name: str, error: str) -> dict[str, Any]:
    """The row of a function that could not be measured."""
    return _identity(case, direction, name) | {"error": error}


def brief(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _identity(case: Case, direction: str, name: str) -> dict[str, Any]:
    """The fields that tell which cell a row is of."""
    return {
        "operator": case.operator,
        "backend": name,
        "direction": direction,
        "shape": list(case.shape.size),
        "dtype": case.dtype,
        "layout": case.layout,
        "used_by": list(case.shape.used_by),
        "gradients_recorded": case.shape.training,
    }


def _draws(case: Case) -> list[Drawn]:
    """Inputs and cotangents; on a GPU, copies of them too, as many as do not fit its L2 cache together."""
    inputs, cotangents = case.draw()
    if torch.device(case.device).type == "cpu":
        return [(inputs, cotangents)]
    copies = math.ceil(_FLUSH_BYTES / sum(tensor.nbytes for tensor in inputs.values()))
    return [(inputs, cotangents)] + [
        (
            {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()},
            tuple(cotangent.clone() for cotangent in cotangents),
        )
        for _ in range(min(copies, CALLS_IN_A_GRAPH) - 1)
    ]


def _arm(calls: list[Callable[[], Any]], device: str) -> Callable[[], Any]:
    """The call to time, of several that differ in their inputs alone: on a CPU the only one, on a GPU a graph of them all."""
    return graph_of(calls) if torch.device(device).type == "cuda" else calls[0]


def graph_of(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """`CALLS_IN_A_GRAPH` calls as one replay of a CUDA graph: their time is the device's, with no Python between them.

    Args:
        calls: Made in turn, again from the first after the last. What they read was written on the current stream, which is
            not the default one; autograd graphs were recorded on it.
    """
    for call in calls:  # kernels are compiled and loaded
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        for index in range(CALLS_IN_A_GRAPH):
            calls[index % len(calls)]()
    return graph.replay


def _call(function: Function, inputs: dict[str, Tensor], cotangents: Outputs, backward: bool) -> Callable[[], Any]:
    if not backward:
        return lambda: function(**inputs)
    outputs, leaves = function(**inputs), list(inputs.values())
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _copy(source: Tensor) -> Callable[[], Any]:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compiled(case: Case) -> Function:
    """The reference under torch.compile for this case alone; compiled at its first call."""
    torch._dynamo.reset()  # so that no call pays for the guards of earlier shapes, or meets the limit of recompilations
    if hasattr(torch._functorch.config, "donated_buffer"):  # came with torch 2.6; its backward could be called only once
        torch._functorch.config.donated_buffer = False
    return torch.compile(case.function(REFERENCE), dynamic=False)


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


def differentiated(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A function of tensors, and the gradient of its mean square with respect to them, as one vector."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(leaves)
    value.square().mean().backward()  # which FLOPs can be counted of, unlike torch.autograd.grad's
    return value.detach(), torch.cat([leaf.grad.flatten() for leaf in leaves])


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
    """Time of one call by events, after a write that leaves nothing in the L2 cache and keeps the device busy for some 60 µs.

    Host work of a call beyond these microseconds counts as its time, as it does for whoever makes the call: what is about the
    device alone is a CUDA graph (`graph_of`).
    """
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
