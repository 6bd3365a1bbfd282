"""Seconds and peak memory against the size of the image, in tiles and whole, beside the published program.

    python -m ncsr_fast.benchmarks.sizes --published PATH_TO_A_CHECKOUT_OF_NCSR

Every measurement is made in a process of its own, whose memory the system counts (`ru_maxrss`): what is stored is the most
there was beyond what the process had with the model loaded and warm. A first image takes the encoder and the flow; a further
sample of the same photograph the flow alone, but for the published program, which begins anew. A gradient is that of a decoding
with respect to its latents; the published program's begins with the encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsr_fast import NCSR
from ncsr_fast.cli._common import Gathered, thread_count
from ncsr_fast.files import atomic_write
from ncsr_fast.memory import is_out_of_memory, within_free_memory

from .arms import OURS, PUBLISHED, Task, draw_latents, random_model
from .harness import differentiated, rounded
from .provenance import provenance, recorded_command
from .published import PublishedNCSR
from .report import to_json

COMPACT, FULL = "ncsr-compact-x4", "ncsr-x4"
TILED = "ncsr_fast, in tiles"
TILE = 128  # LR pixels
SCALE = 4
SIZES = {COMPACT: (64, 128, 256, 512, 1024, 2048, 4096), FULL: (64, 128, 256, 512)}
GRADIENT_SIZES = {COMPACT: (64, 128, 256, 512, 1024), FULL: (64, 128, 256)}
_WARM = 16  # LR pixels of the image that a model is warmed up with
_ENOUGH, _MOST = 2.0, 7  # a short call is repeated for so many seconds, at most so many times


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        model: `COMPACT` or `FULL`.
        arm: `PUBLISHED`, `OURS` (whole), or `TILED`.
        task: "sample", a first image and a further one, or "gradient".
        side: Pixels a side of the image made.
    """

    model: str
    arm: str
    task: str
    side: int


def cells(most: int, published: bool) -> list[Cell]:
    """The measurements of images of at most so many pixels a side."""
    found = []
    for model, sizes in SIZES.items():
        for side in (size for size in sizes if size <= most):
            arms = [PUBLISHED, OURS] if model == FULL else [OURS, TILED]
            arms = [arm for arm in arms if (arm != PUBLISHED or published) and (arm != TILED or side > SCALE * TILE)]
            found += [Cell(model, arm, "sample", side) for arm in arms]
            if side in GRADIENT_SIZES[model]:
                found += [Cell(model, arm, "gradient", side) for arm in arms if arm != TILED]
    return found


def photograph(side: int) -> Tensor:
    """A smooth LR image (1, 3, side, side), the same every time; pixels drawn at random are no photograph, and may blow up."""
    y, x = torch.meshgrid(torch.arange(side) / 30, torch.arange(side) / 40, indexing="ij")
    return torch.stack([0.5 + 0.35 * torch.sin(x + shift) * torch.cos(y - shift) for shift in (0, 1, 2)])[None]


def measured(cell: Cell, published: Path | None) -> dict[str, Any]:
    """The figures of a cell, or its "error" where memory does not hold it; for a process that does nothing else."""
    try:
        with within_free_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of samples of random weights that blew up
            model = NCSR.from_pretrained(COMPACT).eval() if cell.model == COMPACT else random_model("cpu")
            if cell.arm != PUBLISHED:
                return _ours(cell, model)
            assert published is not None
            return _published(cell, PublishedNCSR(published, model.published_state_dict(), "cpu"))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"error": "out of memory"}


def _ours(cell: Cell, model: NCSR) -> dict[str, Any]:
    tile = TILE if cell.arm == TILED else None
    lr, generator = photograph(cell.side // SCALE), torch.Generator().manual_seed(0)
    flow = None

    def conditioned(image: Tensor) -> Any:
        with torch.no_grad():
            return model.condition(image, tile=tile)

    def further() -> None:
        with torch.no_grad():
            flow.sample(1, 0.9, generator, tile=tile)

    def first() -> None:
        nonlocal flow
        flow = None  # with what it has computed
        flow = conditioned(lr)
        further()

    with torch.no_grad():
        model.sample(photograph(_WARM), 1, 0.9, tile=None)
    if cell.task == "gradient":
        model.requires_grad_(False)
        latents, flow = _latents(cell, model), conditioned(lr)
        return _figures(lambda: differentiated(flow.decode, latents))
    return _figures(first, further)


def _published(cell: Cell, program: PublishedNCSR) -> dict[str, Any]:
    lr = photograph(cell.side // SCALE)
    if cell.task == "gradient":
        program.train_encoder(False)
        program.train_flow(False)
        latents = _latents(cell, program.holder)
        return _figures(lambda: program.decode_and_differentiate(latents, lr))

    def sample(image: Tensor) -> None:
        with torch.no_grad():
            program.sample(image, 1, 0.9)

    sample(photograph(_WARM))
    return _figures(lambda: sample(lr), lambda: sample(lr))


def _latents(cell: Cell, model: NCSR) -> list[Tensor]:
    return draw_latents(Task("gradient", 1, cell.side // SCALE, decode=True), model, "cpu")


def _figures(call: Callable[[], Any], further: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Seconds of a call, of a further one behind it, and the most memory that both took."""
    with contextlib.suppress(OSError):  # so that loading the model, which took more for a moment, does not hide a small image
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident()
    figures = {"seconds": _seconds(call)}
    if further is not None:
        figures["further_s"] = _seconds(further)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures | {"peak_bytes": max(0, peak - before)}


def _seconds(call: Callable[[], Any]) -> float:
    """The median of a few calls; of a long one the first."""
    times: list[float] = []
    while not times or (sum(times) < _ENOUGH and len(times) < _MOST):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return rounded(sorted(times)[len(times) // 2])


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_a_process(cell: Cell, threads: int, published: Path | None) -> dict[str, Any]:
    """The figures of a cell, measured in a process of its own; its "error" where that ended without any."""
    command = [
        sys.executable,
        "-m",
        "ncsr_fast.benchmarks.sizes",
        "--threads",
        str(threads),
        "--cell",
        json.dumps(asdict(cell)),
    ]
    command += [] if published is None else ["--published", str(published)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"the process ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _stored(file: Path, wanted: list[Cell]) -> list[dict[str, Any]]:
    """The rows in a file of cells that are not measured now."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return [row for row in rows if Cell(row["model"], row["arm"], row["task"], row["side"]) not in wanted]


@contextlib.contextmanager
def _told(cell: Cell) -> Iterator[None]:
    start = time.perf_counter()
    yield
    took = time.perf_counter() - start
    print(f"{cell.model}, {cell.arm}, {cell.task}, {cell.side}×{cell.side}: {took:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the command is stored in the rows
    )
    parser.add_argument("--published", type=Path, help="checkout of the published NCSR repository; left out without one")
    parser.add_argument("--models", nargs="+", action=Gathered, choices=list(SIZES), help="default: both")
    parser.add_argument("--most", type=int, default=4096, help="largest image, pixels a side (default: %(default)s)")
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the JSON rows (default: %(default)s)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # of the processes that this program starts
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cell:
        print(json.dumps(measured(Cell(**json.loads(args.cell)), args.published)))
        return
    where = provenance("cpu")
    where["command"] = recorded_command("ncsr_fast.benchmarks.sizes", sys.argv[1:], {args.published: "PATH"})
    wanted = [cell for cell in cells(args.most, args.published is not None) if cell.model in (args.models or SIZES)]
    file = args.out / "sizes-cpu.json"
    others, rows = _stored(file, wanted), []
    for cell in wanted:
        with _told(cell):
            rows.append(asdict(cell) | in_a_process(cell, args.threads, args.published) | where)
        with atomic_write(file) as path:  # after every cell: a stopped run keeps it
            path.write_text(to_json(others + rows), encoding="utf-8")
    failed = [row for row in rows if row.get("error", "out of memory") != "out of memory"]
    if failed:
        raise ValueError(f"{len(failed)} of {len(rows)} measurements failed: {failed[0]['error']}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
