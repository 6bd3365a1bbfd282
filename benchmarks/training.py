"""Training from photographs on disk: ours beside the published trainer's step, reading crops, resuming, several processes.

    python -m ncsr_fast.benchmarks.training IMAGES --published PATH_TO_A_CHECKOUT_OF_NCSR

`steps`      images a second, and the share of the time spent waiting for data: the paper's ×4 model, steps of the programs'
             own loops on the same PNG files, in turn
`loader`     crops a second that one process reads: decoded each time, and from the cache once it is warm
`resume`     what a checkpoint costs: bytes, seconds to save it, seconds to check and load it
`processes`  images a second of `ncsr-fast train`, alone with all threads, and as two processes with half of them each
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.cli._common import Gathered, thread_count
from ncsr_fast.data import RandomCrops, list_images, read_image, write_image
from ncsr_fast.files import atomic_write
from ncsr_fast.training.loop import StageLoop
from ncsr_fast.training.processes import Processes, StopSignals
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import FlowStage
from ncsr_fast.training.validation import Validation

from .harness import quantiles, rounded
from .provenance import provenance, recorded_command
from .published import PublishedTrainer
from .report import to_json, training_table

TASKS = ("steps", "loader", "resume", "processes")
_IMAGES = 40  # photographs, as PNG: the published data set reads nothing else
_CROPS = 200  # of a loader
_OURS = {"ncsr_fast": {}, "ncsr_fast, bf16": {"precision": "bf16"}}

Row = dict[str, Any]


def settings_of(folder: Path, **changes: Any) -> TrainSettings:
    values = {"encoder_steps": 0, "steps": 10**6, "unfreeze": 0.0, "workers": 1, "log_every": 10**6, **changes}
    return TrainSettings(**{"model": NCSRConfig.preset("ncsr-x4"), "images": (str(folder),), **values})


def stage_loop(settings: TrainSettings, folder: Path, device: str) -> StageLoop:
    """The loop of `ncsr_fast.training.train`, at its first step."""
    torch.manual_seed(0)
    model = NCSR(settings.model, precision=settings.precision).to(device).train()
    run = Run(folder, settings)
    run.begin()
    crops = RandomCrops(
        settings.images, scale=settings.model.scale, crop=settings.crop, cache_folder=folder / "cache", cache_bytes=2**30
    )
    processes = Processes(torch.device(device))
    validation = Validation(model, run, processes, {})
    loop = StageLoop(FlowStage(model, settings), model, run, crops, processes, StopSignals(), validation)
    loop.begin(0, None)
    return loop


# -- steps -----------------------------------------------------------------------------------------------------------


def steps(images: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Each arm does a step from its own loader in turn; the others' steps do not count as time to read ahead in."""
    arms: dict[str, tuple[Iterator[Any], Callable[[Any, int], None]]] = {}
    if args.published:
        trainer = PublishedTrainer(args.published, args.device, args.batch, args.crop, 0.05)
        arms["published"] = _forever(lambda: trainer.loader(images, 0)), lambda batch, number: trainer.step(batch)
    for name, changes in _OURS.items():
        if changes and not args.bf16:
            continue
        # no worker: whatever reads, reads in the arm's own time
        settings = settings_of(images, batch=args.batch, crop=args.crop, workers=0, **changes)
        loop = stage_loop(settings, scratch / name, args.device)
        arms[name] = loop.batches(), lambda batch, number, loop=loop: _advance(loop, batch, number)
    waits: dict[str, list[float]] = {name: [] for name in arms}
    totals: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(args.warm_up + args.rounds):
        for name, (batches, step) in arms.items():
            started = time.perf_counter()
            batch = next(batches)
            waits[name].append(time.perf_counter() - started)
            step(batch, number)
            totals[name].append(time.perf_counter() - started)
    for name in arms:
        low, median, high = quantiles(totals[name][args.warm_up :])
        share = sum(waits[name][args.warm_up :]) / sum(totals[name][args.warm_up :])
        yield {
            "task": "steps", "arm": name, "batch": args.batch, "crop": args.crop, "median_s": rounded(median),
            "p20_s": rounded(low), "p80_s": rounded(high), "images_per_s": rounded(args.batch / median),
            "data_share": rounded(share), "rounds": args.rounds,
        }  # fmt: skip


def _advance(loop: StageLoop, batch: Any, number: int) -> None:
    parts, _ = loop.advance(number, loop.inputs(batch, number, slice(None)))
    parts[0].item()  # as the published program reads its loss


def _forever(loader: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield from loader()


# -- loader ----------------------------------------------------------------------------------------------------------


def loader(images: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    arms: dict[str, Callable[[], Any]] = {}
    if args.published:
        data = PublishedTrainer(args.published, "cpu", 1, args.crop, 0.05).loader(images, 0).dataset
        arms["published: decode, crop, LR by imresize"] = lambda: [data[number % len(data)] for number in range(_CROPS)]
    plain = RandomCrops(images, scale=4, crop=args.crop)
    cached = RandomCrops(images, scale=4, crop=args.crop, cache_folder=scratch / "loader", cache_bytes=2**30)
    for number in range(4 * _IMAGES):
        cached[number]
    arms["ncsr_fast, without a cache"] = lambda: [plain[number] for number in range(_CROPS)]
    arms["ncsr_fast, from the cache"] = lambda: [cached[number] for number in range(_CROPS)]
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(3):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            times[name].append(time.perf_counter() - started)
    for name, measured in times.items():
        rate = _CROPS / statistics.median(measured)
        yield {"task": "loader", "arm": name, "crop": args.crop, "crops_per_s": rounded(rate), "rounds": 3}


# -- resume ----------------------------------------------------------------------------------------------------------


def resume(images: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    settings = settings_of(images, batch=1, crop=64, workers=0)
    loop = stage_loop(settings, scratch / "resume", args.device)
    loop.advance(0, loop.inputs(next(loop.batches()), 0, slice(None)))  # Adam has its state then
    saved, loaded = [], []
    for _ in range(3):
        started = time.perf_counter()
        loop.save(1)
        saved.append(time.perf_counter() - started)
        started = time.perf_counter()
        checkpoint = loop.run_folder.latest("flow", loop.model)
        loop.begin(1, checkpoint)
        loaded.append(time.perf_counter() - started)
    (path,) = (scratch / "resume" / "checkpoints").glob("*.pt")
    yield {
        "task": "resume", "arm": "ncsr_fast", "bytes": path.stat().st_size, "save_s": rounded(statistics.median(saved)),
        "load_s": rounded(statistics.median(loaded)), "rounds": 3,
    }  # fmt: skip


# -- processes -------------------------------------------------------------------------------------------------------


def processes(images: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of runs by one and by two processes, of the compact model, whose steps are short enough to do many."""
    flags = ["train", "--preset", "ncsr-compact-x4", "--images", str(images), "--encoder-steps", "0", "--unfreeze", "0"]
    flags += ["--steps", "60", "--log-every", "20", "--validate-every", "1000", "--validation-images", "1", "--batch", "16"]
    command = [sys.executable, "-m", "ncsr_fast.cli.main"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ncsr_fast.cli.main"]
    arms = {"1 process": (command, args.threads), "2 processes": (torchrun, max(1, args.threads // 2))}
    for name, (start, threads) in arms.items():
        run = scratch / name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [*start, *flags, "--run-dir", str(run), "--device", args.device]
        subprocess.run(command, check=True, env=environment, cwd=scratch, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        rates = [row["images_per_s"] for row in rows if "images_per_s" in row][1:]  # the first includes the start
        losses = [row["loss"] for row in rows if "loss" in row]
        yield {
            "task": "processes", "arm": f"{name}, {threads} threads each", "batch": 16, "crop": 96,
            "images_per_s": rounded(statistics.mean(rates)), "last_loss": rounded(losses[-1]), "rounds": 40,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the command is stored in the rows
    )
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--published", type=Path, help="checkout of the published NCSR repository; left out without one")
    parser.add_argument("--tasks", nargs="+", action=Gathered, choices=TASKS, default=TASKS)
    parser.add_argument("--batch", type=int, default=1, help="of `steps` (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=160, help="side of an HR crop (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each arm (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before that (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="an arm with bf16 networks too, slow on a CPU that has no bf16")
    parser.add_argument(
        "--threads", type=thread_count, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the JSON rows (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = provenance(args.device)
    paths = {args.images: "IMAGES", args.published: "PATH"}
    where["command"] = recorded_command("ncsr_fast.benchmarks.training", sys.argv[1:], paths)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for number, path in enumerate(list_images(args.images)[:_IMAGES]):
            write_image(scratch / "images" / f"{number:03}.png", read_image(path))
        for task in args.tasks:
            rows += [row | where for row in globals()[task](scratch / "images", scratch, args)]
    stored = args.out / f"training-{args.device}.json"
    others = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    others = [row for row in others if row["task"] not in args.tasks]  # what is not measured now is kept
    with atomic_write(stored) as path:
        path.write_text(to_json(others + rows), encoding="utf-8")
    print(training_table(rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
