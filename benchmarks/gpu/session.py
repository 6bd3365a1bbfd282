"""The session an item is given: sizes, models, inputs, timers, capture, and the file of results."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ncsr_fast import NCSR, NCSRConfig, graphs, ops
from ncsr_fast.benchmarks.arms import random_model
from ncsr_fast.benchmarks.harness import CALLS_IN_A_GRAPH, graph_of, quantiles, rounded, side_by_side
from ncsr_fast.benchmarks.published import OPTIONS
from ncsr_fast.engine import EngineOptions
from ncsr_fast.files import atomic_write

RESULTS = "results.jsonl"
_PART_SECONDS = 1.0  # a part begins only where more is left
_FEWEST_ROUNDS, _MOST_SECONDS = 3, 3.0
_LAST_LINES = 12  # of a traceback
_NAME_LENGTH = 110  # of a kernel
_SYNCHRONISING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cuCtxSynchronize")


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: the paper's ×4 model at the paper's batch, and samples of a small and of a DIV2K image."""

    options: dict[str, Any] = field(default_factory=lambda: OPTIONS)  # of the published program
    batch: int = 18
    lr: int = 40  # side of an LR image in training
    image: tuple[int, int] = (40, 40)
    large_image: tuple[int, int] = (340, 510)
    samples: int = 10
    check_lr: int = 16
    rounds: int = 10
    matrices: tuple[tuple[int, int], ...] = ((18, 12), (18, 24), (18, 96), (22, 192))
    channels: tuple[int, ...] = (12, 24, 96)
    copied: int = 2**32  # bytes
    product: int = 8192

    @property
    def config(self) -> NCSRConfig:
        """Configuration of the model that these options describe."""
        return NCSRConfig.from_published(self.options)


_DRY_FLOW = OPTIONS["network_G"]["flow"] | {
    "K": 1, "S": [0, 1, 1], "stackRRDB": {"blocks": [0, 1], "concat": True},
    "CondAffineSeparatedAndCond": {"hidden_channels": 8},
}  # fmt: skip
_DRY = Sizes(
    OPTIONS | {"network_G": OPTIONS["network_G"] | {"nf": 8, "gc": 4, "nb": 2, "flow": _DRY_FLOW}},
    batch=2, lr=4, image=(4, 4), large_image=(4, 6), samples=2, check_lr=4, rounds=1, matrices=((3, 4),), channels=(4,),
    copied=2**16, product=16,
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Settings that all items share.

    Attributes:
        out: Folder of the results.
        dry: On the CPU, at sizes that tell nothing: to see that every line runs.
        published: Checkout of the published NCSR.
        tests: Folder of the tests of this package.
        command: The command line, as the rows have it.
        scratch: A folder for what one item makes and others use, while the program runs.
    """

    out: Path
    dry: bool = False
    published: Path | None = None
    tests: Path | None = None
    command: str = ""
    scratch: Path | None = None

    def record(
        self, item: str, part: str | None, ok: bool | None, seconds: float, error: str | None, figures: dict | None = None
    ) -> None:
        """Add a row to the results, flushed."""
        row = {"item": item, "part": part, "ok": ok, "seconds": round(seconds, 2), "error": error, "figures": figures or {}}
        line = json.dumps(row | {"dry": self.dry}, ensure_ascii=False) + "\n"
        with (self.out / RESULTS).open("ab", buffering=0) as file:  # whole: whoever writes may be killed
            file.write(line.encode())


class Session:
    """An item at work."""

    def __init__(self, setup: Setup, item: str, deadline: float) -> None:
        self.setup, self.item, self.deadline = setup, item, deadline
        self.device = "cpu" if setup.dry else "cuda"
        self.capture = not setup.dry  # in CUDA graphs; a dry run calls what would be captured
        self.sizes = _DRY if setup.dry else Sizes()
        self.failed: list[str] = []

    def part(self, name: str, function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
        """Figures that `function` returns, recorded; {} where it raises, which is recorded too and fails the item.

        A part that would begin in the last second before the deadline is recorded as skipped.
        """
        started = time.monotonic()
        if self.left() < (0 if self.setup.dry else _PART_SECONDS):
            self.setup.record(self.item, name, None, 0.0, "the deadline of the item is near")
            return {}
        figures, error = {}, None
        try:
            figures = function(*arguments, **options)
        except Exception:
            traceback.print_exc()
            error = "\n".join(traceback.format_exc().strip().splitlines()[-_LAST_LINES:])
            self.failed.append(name)
        self.setup.record(self.item, name, error is None, time.monotonic() - started, error, figures)
        return figures

    def skip(self, name: str, reason: str) -> None:
        """Record that a part is left out."""
        self.setup.record(self.item, name, None, 0.0, reason)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def backends(self) -> list[str]:
        """Backends of the operators on this device, but for Triton's interpreter."""
        available = [name for name, state in ops.backends(self.device).items() if state.available]
        return [name for name in available if name != "triton" or self.device == "cuda"]

    def model(self, **options: Any) -> NCSR:
        """A model with the same weights every time, made by the first item that asks."""
        path = self.setup.scratch / "model.pt"
        if not path.exists():
            with atomic_write(path) as temporary:
                torch.save(random_model("cpu", self.sizes.config), temporary)
        model = torch.load(path, weights_only=False).to(self.device)
        model.options = EngineOptions(**options)
        return model

    def batch(self, size: int | None = None, lr: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hr, lr and noise of a training step, the same numbers every time."""
        size, side = size or self.sizes.batch, lr or self.sizes.lr
        wide = self.sizes.config.scale * side
        hr, noise = self.random(size, 3, wide, wide), self.random(size, 3, wide, wide, seed=1)
        return hr, self.random(size, 3, side, side, seed=2), 0.03 * (noise - 0.5)

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], rounds: int | None = None) -> dict[str, Any]:
        """Wall-clock time of a call from an idle device to an idle device, and most memory beyond what there was before.

        `first_s` is the first call, which compiles and captures, and whose memory counts: a replay allocates none. Long calls
        have fewer rounds.
        """
        times, cuda = [], self.device == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for number in range(1 + (rounds or self.sizes.rounds)):
            self.synchronize()
            started = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - started)
            if number >= _FEWEST_ROUNDS and (sum(times[1:]) > _MOST_SECONDS or self.left() < 3 * times[-1]):
                break
        low, median, high = quantiles(times[1:])
        return {
            "median_s": rounded(median),
            "p20_s": rounded(low),
            "p80_s": rounded(high),
            "rounds": len(times) - 1,
            "first_s": rounded(times[0]),
            "peak_bytes": torch.cuda.max_memory_allocated() - before if cuda else None,
        }

    def device_seconds(self, *calls: Callable[[], Any], rounds: int = 5) -> float:
        """Time of a call on the device alone; several calls differ in their inputs and take turns."""
        if not self.capture:
            return statistics.median(side_by_side({"": calls[0]}, self.device, 0.0, 1, warm_up=1)[""])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            replay = graph_of(list(calls))
            return statistics.median(side_by_side({"": replay}, self.device, 0.0, rounds)[""]) / CALLS_IN_A_GRAPH

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function as the replay of a CUDA graph, which returns its results."""
        if not self.capture:
            return function
        replay, results = graphs.capture(function, self.device, warm_up=1)

        def replayed() -> Any:
            replay()
            return results

        return replayed

    def events(self, call: Callable[[], Any]) -> list[dict[str, Any]]:
        """Events that the profiler saw of a call: kernels, copies and calls of the CUDA runtime; on a CPU, operators."""
        kind = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        self.synchronize()
        with profile(activities=[kind]) as recorded:
            call()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            recorded.export_chrome_trace(str(Path(folder) / "trace.json"))
            events = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
        return [event for event in events if "dur" in event and "cat" in event]

    def profile(self, call: Callable[[], Any], top: int = 40) -> dict[str, Any]:
        """Launches, the share of the time in which the device worked, and the kernels that took most of it."""
        events = self.events(call)
        work = ("kernel", "gpu_memcpy", "gpu_memset") if self.device == "cuda" else ("cpu_op",)
        kernels = [event for event in events if event["cat"] in work]
        if not kernels:
            raise RuntimeError("the profiler recorded no kernel")
        runtime = Counter(event["name"] for event in events if event["cat"] in ("cuda_runtime", "cuda_driver"))
        times: defaultdict[str, list[float]] = defaultdict(list)
        for event in kernels:
            times[event["name"][:_NAME_LENGTH]].append(event["dur"])
        busy = sum(map(sum, times.values()))
        begin, end = min(event["ts"] for event in kernels), max(event["ts"] + event["dur"] for event in kernels)
        ranked = sorted(times.items(), key=lambda entry: -sum(entry[1]))[:top]
        return {
            "kernels": len(kernels),
            "launches": sum(count for name, count in runtime.items() if "Launch" in name),
            "synchronising": synchronising(events),
            "span_s": rounded(1e-6 * (end - begin)),
            "busy_s": rounded(1e-6 * busy),
            "top": [[name, len(spent), rounded(sum(spent)), round(sum(spent) / busy, 4)] for name, spent in ranked],
        }


def some_of(names: list[str], most: int = 6) -> str:
    """Names in a line, the first ones where there are many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def synchronising(events: list[dict[str, Any]]) -> int:
    """Number of calls of the CUDA runtime that wait for the device, the profiler's own included."""
    return sum(event["name"].startswith(_SYNCHRONISING) for event in events)
