"""Predictions of how long the Triton kernels take on GPUs that are not here, and of which limit binds each.

    python -m ncsr_fast.benchmarks.cost_model --gpu H100 H200 [--precisions bf16]

A kernel is compiled ahead of time (`ncsr_fast.kernels.ahead_of_time`), which tells its instructions, registers and shared
memory, and what a launch is given. Its predicted time is the longest of: bytes by the bandwidth of the memory, and of the L2
cache; FLOPs by the peaks of tensor cores and of float32; instructions by the rate at which a multiprocessor issues them; a
launch. Limits do not slow each other down, and what is read again comes from a cache, so times are too short; masked accesses
count as bytes of the L2 cache, and both sides of a branch as instructions, so they are too long. None of it is a measurement.
The reference beside a kernel is the same function in PyTorch's operators, by bytes, FLOPs at the peak, and launches.

`--tables` writes the predicted gains of kernels that were neither measured nor in use before as tables of the GPUs, by which
"auto" chooses (`ncsr_fast.tuning`).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ncsr_fast import NCSRConfig, tuning
from ncsr_fast.files import atomic_write
from ncsr_fast.ops import reference

from .fake_cuda import fake_cuda
from .launches import LaunchCounter
from .registry import USES, level_shapes

# Shares of a data sheet's numbers that programs reach: matrix products on tensor cores and copies, by the kernel study of the
# design (790 of 989 TFLOP/s, 4.3 of 4.8 TB/s), estimated there and measured on neither GPU here
PRODUCTS, COPIES = 0.8, 0.9
L2_BANDWIDTH = 6e12  # bytes a second, the GPU review's estimate for both
LAUNCH = 2e-6  # seconds, at least, of a kernel in a CUDA graph (`launches`)
SCHEDULERS = 4  # of a multiprocessor, each issuing an instruction a cycle (CUDA C++ Programming Guide, compute capability 9.0)
DEPENDENT = 4  # cycles until what needs the result of an arithmetic instruction can be issued (Jia et al. 2018, for Volta on)
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 227 * 1024, 64, 32  # of a multiprocessor of 9.0 (the same guide, table of limits)
RESERVED = 1024  # bytes of shared memory that the system takes for each program (the same)
WARP = 32  # threads


@dataclass(frozen=True)
class Gpu:
    """The limits of a kernel on a GPU: rates by its data sheet, times the share that programs reach."""

    name: str  # PyTorch's
    capability: str
    multiprocessors: int
    clock: float  # of the float32 peak: 67 TFLOP/s are 2 × 128 lanes × multiprocessors × clock
    bandwidth: float  # bytes a second
    bfloat16: float  # FLOP a second on tensor cores
    tf32: float
    float32: float


_HOPPER: dict[str, Any] = {  # NVIDIA's data sheets of H100 SXM and H200 SXM, products without sparsity
    "capability": "9.0",
    "multiprocessors": 132,
    "clock": 67e12 / (2 * 128 * 132),
    "bfloat16": PRODUCTS * 989e12,
    "tf32": PRODUCTS * 494e12,
    "float32": 67e12,
}
GPUS = {
    "H100": Gpu("NVIDIA H100 80GB HBM3", bandwidth=COPIES * 3.35e12, **_HOPPER),
    "H200": Gpu("NVIDIA H200", bandwidth=COPIES * 4.8e12, **_HOPPER),
}

# Trips of the loops that a compiled kernel has, the outermost first, by what it is given. Without loops it needs no entry.
TRIPS: dict[str, Callable[[dict[str, int]], tuple[int, ...]]] = {
    "sum_partials_kernel": lambda given: (math.ceil(given["parts"] / given["BLOCK_PARTS"]),),
    "flow_step_forward_kernel": lambda given: (given["BLOCKS_K"],),
    "flow_step_backward_kernel": lambda given: (given["BLOCKS_K"],),
    "flow_step_backward_weight_kernel": lambda given: (given["tiles"],),
    "hidden_kernel": lambda given: (9 * given["BLOCKS_K"],),
    "output_kernel": lambda given: (9 * given["BLOCKS_K"],),
    "coupled_step_kernel": lambda given: _regions_and_tiles(given),
    # in float32; of the two loops one after the other the longer
    "hidden_backward_kernel": lambda given: (9 * max(given["BLOCKS_C"], given["BLOCKS_K"]),),
    "state_backward_kernel": lambda given: (9 * given["BLOCKS_K"],),
    "network_weight_kernel": lambda given: (given["tiles"],),
    "sum_network_partials_kernel": lambda given: (math.ceil(given["parts"] / given["BLOCK_PARTS"]),),
    "conv3x3_kernel": lambda given: (_taps(given) * math.ceil(given["inputs"] / given["BLOCK_K"]),),
    "conv3x3_weight_kernel": lambda given: (given["tiles"],),
    "sum_weight_partials_kernel": lambda given: (math.ceil(given["parts"] / given["BLOCK_PARTS"]),),
    "sum_dense_block_partials_kernel": lambda given: (math.ceil(given["parts"] / given["BLOCK_PARTS"]),),
    "hoisted_kernel": lambda given: (_trips_hoisted(given),),
    "hoisted_backward_kernel": lambda given: ((given["FACTOR"] + 2) ** 2 * math.ceil(given["inputs"] / given["BLOCK_K"]),),
    "hoisted_weight_kernel": lambda given: (given["tiles"],),  # of a slot that is one phase, as all are for factors of 1 and 2
    "sum_slots_kernel": lambda given: (given["parts"],),
    "inverse_logdet_kernel": lambda given: (given["channels"], math.ceil(given["channels"] / given["ROWS"])),
}


def _regions_and_tiles(given: dict[str, int]) -> tuple[int, ...]:
    """Regions of a program, tiles of a region with its border, and products of a convolution; the last alone of one tile."""
    products = 9 * max(given["BLOCKS_K"], given["READS"])
    if not given["PROGRAMS"]:
        return (products,)
    rows, columns = given["DOWN"] * given["ROWS"], given["ACROSS"] * given["COLUMNS"]
    regions = given["batch"] * math.ceil(given["height"] / rows) * math.ceil(given["width"] / columns)
    tiles = math.ceil((rows + 2) * (columns + 2) / (given["ROWS"] * given["COLUMNS"]))
    return math.ceil(regions / given["PROGRAMS"]), tiles, products


def _taps(given: dict[str, int]) -> int:
    """Pixels that a convolution reads for one that it writes; the gradient of an upsampled input reads four times as many."""
    return 36 if given["UPSAMPLE2X"] and given["TRANSPOSED"] else 9


def _trips_hoisted(given: dict[str, int]) -> int:
    """The mean of two loops with bodies of one size: over the taps of the own features, and of the stacked ones."""
    of_axis = (given["FACTOR"] + 2) / given["FACTOR"]
    own, stacked = (math.ceil(given[name] / given["BLOCK_K"]) for name in ("owned", "inputs"))
    return round((9 * own + of_axis**2 * stacked) / 2)


@dataclass(frozen=True)
class Task:
    """A pass through the ×4 model: a name in `registry.USES`, its batch and direction, and whether it goes backward too."""

    what: str
    use: str
    batch: int
    direction: str
    backward: bool

    def levels(self) -> list[tuple[int, tuple[int, int, int]]]:
        """The channels of each level, and its batch, height and width."""
        return [(channels, (self.batch, *size)) for _, channels, *size in (shape.size for shape in level_shapes(self.use))]

    def images(self) -> list[tuple[int, tuple[int, int, int]]]:
        """The channels of the encoder's features, and the batch, height and width of the LR images."""
        use = USES[self.use]
        return [(NCSRConfig.preset(use.preset).channels, (use.batch, *use.lr))]


TASKS = {
    "train": Task("a training step, batch 18 of 160×160", "x4-train", 18, "forward", backward=True),
    "sample": Task("10 samples of a DIV2K image, LR 340×510", "div2k", 10, "inverse", backward=False),
}


# Functions of `ncsr_fast.kernels.calls` by name, with the channels and sizes of a task, and the variants of theirs that it has
CALLS: dict[str, tuple[Callable[[Task], Sequence[tuple[int, tuple[int, int, int]]]], Callable[[Task], Sequence[Any]]]] = {
    "flow_calls": (Task.levels, lambda task: [(task.direction, "nhwc", dtype) for dtype in ("float32", "bfloat16")]),
    "network_calls": (Task.levels, lambda task: ["bf16", "tf32", "fp32"]),
    "coupled_calls": (Task.levels, lambda task: ["bf16", "tf32", "fp32"]),
    "network_backward_calls": (Task.levels, lambda task: ["bf16", "tf32", "fp32"] if task.backward else []),
    "together_calls": (Task.levels, lambda task: ["bf16", "tf32", "fp32"]),
    "filter_calls": (Task.levels, lambda task: ["bf16", "fp32"]),
    "dense_block_calls": (Task.images, lambda task: ["bf16", "tf32", "fp32"]),
    "hoisting_calls": (Task.images, lambda task: ["bf16", "tf32", "fp32"]),
}
# Words in the names of calls, and the dtype that decides between backends
DTYPES = {"float32": "float32", "fp32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
PRECISIONS = ("bf16", "tf32", "fp32")
Key = tuple[int, str, str, str]  # channels, operator, call and host function


@dataclass(frozen=True)
class Prediction:
    """The predicted seconds of a launch by each limit. The limit that binds is the one with most."""

    by_limit: dict[str, float]

    @property
    def limit(self) -> str:
        return max(self.by_limit, key=self.by_limit.__getitem__)

    @property
    def seconds(self) -> float:
        return self.by_limit[self.limit]


def predict(row: Any, gpu: Gpu) -> Prediction:
    """The predicted time of the launch of a row of `ahead_of_time`.

    Raises:
        ValueError: The kernel has loops, and `TRIPS` has no entry for it.
    """
    warps = row.programs * row.warps
    busiest = math.ceil(row.programs / gpu.multiprocessors)  # programs of a multiprocessor, one after the other or at once
    at_once = min(busiest, resident(row))
    rate = min(SCHEDULERS, at_once * row.warps / DEPENDENT)  # instructions of the multiprocessor a cycle
    issue = "issue slots" if rate == SCHEDULERS else "latency of instructions"
    return Prediction(
        {
            "memory": row.bytes / gpu.bandwidth,
            "L2 cache": warps * per_warp(row, row.accessed) / L2_BANDWIDTH,
            "tensor cores": warps * per_warp(row, row.tensor_flops) / (gpu.tf32 if row.tf32 else gpu.bfloat16),
            "float32": warps * per_warp(row, row.fp32_flops) / gpu.float32,
            issue: busiest * row.warps * per_warp(row, row.issued) / rate / gpu.clock,
            "launch": LAUNCH,
        }
    )


def resident(row: Any) -> int:
    """Programs that a multiprocessor holds at once, by registers, shared memory, warps and programs; at least one."""
    registers = math.ceil(row.registers / 8) * 8 * WARP * row.warps  # granted 8 a thread at a time
    return max(1, min(REGISTERS // registers, SHARED // (row.shared + RESERVED), WARPS // row.warps, PROGRAMS))


def per_warp(row: Any, by_depth: Sequence[int]) -> int:
    """The amount that a warp does, of an amount that a row has by the number of loops around it."""
    trips: tuple[int, ...] = ()
    if len(by_depth) > 1:
        if row.kernel not in TRIPS:
            raise ValueError(f"{row.kernel} has loops: say in TRIPS how often each runs")
        trips = TRIPS[row.kernel](row.arguments)
        if len(trips) < len(by_depth) - 1:
            raise ValueError(f"{row.kernel} has loops {len(by_depth) - 1} deep: its entry in TRIPS is of {len(trips)}")
    return sum(count * math.prod(trips[:depth]) for depth, count in enumerate(by_depth))


# ---- the launches of a task, and of the reference


def chosen(variants: Sequence[Any], precisions: Sequence[str]) -> list[Any]:
    """The variants of calls in one of the precisions (words of `DTYPES`), by their name or by the dtype of their outputs."""
    dtypes = {DTYPES[precision] for precision in precisions}
    return [each for each in variants if (each in precisions if isinstance(each, str) else each[2] in dtypes)]


def rows_of(task: Task, precisions: Sequence[str] = tuple(PRECISIONS)) -> list[Any]:
    """A row for every launch of the task's calls in these precisions, at every level."""
    from ncsr_fast.kernels import ahead_of_time, calls

    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # the compiler keeps the target of its process
        jobs = [
            pool.submit(ahead_of_time.compile_for, 90, channels, chosen(variants(task), precisions), getattr(calls, name), size)
            for name, (shapes, variants) in CALLS.items()
            for channels, size in shapes(task)
        ]
        rows = [row for job in jobs for row in job.result()]
    return [row for row in rows if task.backward or not row.function.endswith("_backward")]


class _Reference:
    """The reference's functions, whose predicted seconds are added up by name."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.seconds = gpu, defaultdict(float)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counter = _TimedCounter(self.gpu)
            with counter:
                result = getattr(reference, name)(*arguments, **options)
            self.seconds[name] += counter.seconds
            return result

        return call


class _TimedCounter(LaunchCounter):
    """Adds up the predicted seconds of PyTorch's operators."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu, self.seconds = gpu, 0.0

    def _note(self, operator: Any, args: tuple, kwargs: dict, result: Any) -> None:
        before = replace(self.total)
        super()._note(operator, args, kwargs, result)
        launches, moved, flops = (getattr(self.total, name) - getattr(before, name) for name in ("launches", "bytes", "flops"))
        first = result if isinstance(result, torch.Tensor) else next(iter(result or ()), None)
        narrow = isinstance(first, torch.Tensor) and first.dtype in (torch.bfloat16, torch.float16)
        # float32 by TF32's peak: no gain is predicted that a reference allowed to use it would not grant
        peak = self._gpu.bfloat16 if narrow else self._gpu.tf32
        self.seconds += max(LAUNCH * launches, moved / self._gpu.bandwidth, flops / peak)


def reference_seconds(task: Task, gpu: Gpu, precisions: Sequence[str] = tuple(PRECISIONS)) -> dict[Key, float]:
    """The predicted seconds of the reference."""
    from ncsr_fast.kernels import calls

    found = {}
    with fake_cuda():
        for name, (shapes, variants) in CALLS.items():
            for channels, size in shapes(task):
                timed = _Reference(gpu)
                with mock.patch.object(calls, "kernels", timed):
                    for operator, call, body in getattr(calls, name)(channels, size, chosen(variants(task), precisions)):
                        timed.seconds.clear()
                        body()
                        found |= {(channels, operator, call, each): seconds for each, seconds in timed.seconds.items()}
    return found


def gains(rows: Iterable[Any], reference_times: dict[Key, float], gpu: Gpu) -> dict[tuple[str, str], float]:
    """The predicted gain of Triton over the reference by operator and precision, over all functions, calls and levels.

    The precision is the word of `DTYPES` in the name of a call, or "any".
    """
    ours: dict[Key, float] = defaultdict(float)
    for row in rows:
        ours[row.channels, row.operator, row.call, row.function] += predict(row, gpu).seconds
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for key, seconds in ours.items():
        total = sums[key[1], next((word for word in re.split(r"\W", key[2]) if word in DTYPES), "any")]
        total[0] += reference_times[key]
        total[1] += seconds
    return {key: theirs / mine for key, (theirs, mine) in sums.items()}


# ---- what is printed and written


def table(rows: Iterable[Any], gpus: Sequence[str]) -> str:
    """The predictions, a line a launch; the same launch of several calls once."""
    head = f"{'C':>4}  {'operator':21}{'kernel':34}{'programs':>9}{'MB':>9}{'GFLOP':>8}{'instr':>7}"
    lines = [head + "".join(f"{f'{name}, predicted':>16}  {'limit':24}" for name in gpus)]
    for row in rows:
        flops = row.programs * row.warps * (per_warp(row, row.tensor_flops) + per_warp(row, row.fp32_flops))
        counts = f"{row.programs:9}{1e-6 * row.bytes:9.1f}{1e-9 * flops:8.2f}{per_warp(row, row.issued):7}"
        line = f"{row.channels:4}  {row.operator:21}{row.kernel:34}{counts}"
        for found in (predict(row, GPUS[name]) for name in gpus):
            line += f"{1e6 * found.seconds:13.1f} µs  {found.limit:24}"
        if line not in lines:
            lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def predicted_table(gpu: Gpu, predicted: dict[tuple[str, str], float], folder: Path) -> tuning.Table:
    """The package's table of a GPU, with the gains of the kernels that its table for any GPU calls unmeasured.

    Of the precisions of a dtype the least gain: float32 tensors are what TF32 convolves too.
    """
    waiting = {choice.kernel for choice in tuning.read(tuning.PACKAGED / "default.json").backends if not choice.used}
    provenance = {"kind": "predicted", "model": "ncsr_fast.benchmarks.cost_model", "gpu": gpu.name, "torch": torch.__version__}
    least: dict[tuple[str, str | None], float] = {}
    for (operator, precision), gain in sorted(predicted.items()):
        if operator in waiting:
            key = operator, DTYPES.get(precision)
            least[key] = min(gain, least.get(key, gain))
    choices = tuple(tuning.Choice(*key, "triton", round(gain, 2), provenance) for key, gain in least.items())
    return tuning.Table(folder / tuning.file_name(gpu.name), gpu.name, gpu.capability, choices, ())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ncsr_fast.benchmarks.cost_model", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS), help="(default: all)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="(default: all)")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="write the predicted gains to tables in it")
    args = parser.parse_args()
    least: dict[str, dict[tuple[str, str], float]] = {name: {} for name in args.gpu}  # of the tasks
    for task in (TASKS[name] for name in args.tasks):
        rows = rows_of(task, args.precisions)
        print(f"{task.what}: predictions of a model, none of them measured\n{table(rows, args.gpu)}\n")
        for name in args.gpu:
            found = gains(rows, reference_seconds(task, GPUS[name], args.precisions), GPUS[name])
            listed = ", ".join(f"{operator} ({dtype}) {gain:.2f}×" for (operator, dtype), gain in found.items())
            print(f"{name}, predicted gain over the reference: {listed}\n")
            least[name] |= {key: min(gain, least[name].get(key, gain)) for key, gain in found.items()}
    if args.tables:
        for name, predicted in least.items():
            written = predicted_table(GPUS[name], predicted, args.tables)
            with atomic_write(written.file) as path:
                path.write_text(tuning.text(written), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
