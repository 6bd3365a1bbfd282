"""Whole models: samples, training steps and gradients of decoding, ours beside the plain path, torch.compile and the published.

    python -m ncsr_fast.benchmarks.end_to_end --published PATH_TO_A_CHECKOUT_OF_NCSR

A task is one job on one input. Its arms compute the same; that is checked first, and then they take turns in one process. An
arm that fails the check, or raises, has a row with its error; the others are measured, and the exit status is 1.
The arms between "plain" and "ncsr_fast" switch on one part of the engine after the other, in the order of `LADDER`, so that
what each contributes can be read off. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ncsr_fast import NCSR
from ncsr_fast.cli._common import Gathered, thread_count
from ncsr_fast.files import atomic_write

from .arms import (
    ACCELERATED,
    CAPTURED,
    COMPILED,
    CONDITIONED,
    LADDER,
    OURS,
    PUBLISHED,
    Arm,
    Captured,
    Conditioned,
    Ours,
    Task,
    draw_latents,
    random_model,
)
from .harness import brief, quantiles, rounded, side_by_side
from .provenance import provenance, recorded_command
from .published import PublishedNCSR
from .report import end_to_end_table, to_json

_NAMES = [PUBLISHED, ACCELERATED, *LADDER, CONDITIONED, *CAPTURED]
# largest error of a result, relative to the largest element: float32 rounding through 54 steps; what TF32 and bf16 operands
# are measured to do is in the rows
ALLOWED = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 5e-2}
# float32 gradients, in the norm of all of them together: a ReLU next to zero falls on either side
ALLOWED_GRADIENT = {"fp32": 1e-2, "tf32": 5e-2, "bf16": 0.2}


TASKS = [
    Task("sample", 1, 40, n=10),
    Task("sample-one", 1, 40, n=1),
    Task("train", 1, 40),
    Task("train-frozen", 1, 40, frozen_encoder=True),
    Task("train-batch-2", 2, 40),
    Task("train-batch-18", 18, 40),
    Task("sample-div2k", 1, 340, n=10),
    Task("decode-gradient", 1, 40, decode=True),
]
ON_CPU = ("sample", "sample-one", "train", "train-frozen", "train-batch-2", "decode-gradient")
ON_GPU = ("sample", "train", "train-batch-18", "sample-div2k", "decode-gradient")


def measure(
    task: Task, model: NCSR, arms: dict[str, Any], device: str, rounds: int, with_memory: bool, tf32: bool
) -> list[dict[str, Any]]:
    """Rows of a task. An arm that raises, or whose results differ from the reference's, has its `error` and no figures."""
    latents = draw_latents(task, model, device)
    runners = {name: Arm(arm, task, device, latents) for name, arm in arms.items()}
    for runner in runners.values():
        runner.prepare()
    reference = next((name for name in ("plain", OURS) if name in arms), next(iter(arms)))
    errors: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    expected: dict[str, Tensor] | None = None
    for name in sorted(runners, key=lambda name: name != reference):  # the reference first
        try:
            found = runners[name].results()
            expected = found if name == reference else expected
            errors[name] = differences(found, expected) if expected is not None else {}
            if texts := disagreements(name, errors[name], tf32):
                failed[name] = "; ".join(texts)
            elif task.n:
                runners[name].run()  # so that it is warm, as the others are by their results
        except Exception as error:
            failed[name] = brief(error)
    if expected is None:
        failed = {name: f"there is nothing to compare with, as {reference!r} failed" for name in arms} | failed
    figures = _figures({name: runner for name, runner in runners.items() if name not in failed}, device, rounds, with_memory)
    rows = []
    for name in arms:
        found = {"error": failed[name]} if name in failed else figures[name]
        if "error" not in found:
            found["errors"] = {what: rounded(error) for what, error in errors[name].items()}
        rows.append({"task": task.name, "what": task.describe(), "arm": name} | found)
    return rows


def disagreements(name: str, errors: dict[str, float], tf32: bool) -> list[str]:
    """Complaints about errors larger than the precision allows that an arm's name says."""
    precision = name.rpartition(", ")[2] if name.endswith(("tf32", "bf16")) else "tf32" if tf32 else "fp32"
    allowed = {what: (ALLOWED_GRADIENT if what == "gradient" else ALLOWED)[precision] for what in errors}
    return [
        f"the {what} of {name!r} is off by {error:.1e}, allowed {allowed[what]:.0e}"
        for what, error in errors.items()
        if not error <= allowed[what]
    ]


def _figures(runners: dict[str, Arm], device: str, rounds: int, with_memory: bool) -> dict[str, dict[str, Any]]:
    """Figures of arms that are warm; the `error` of those that raise."""
    try:  # a first call is timed to see how long it is
        times = side_by_side({name: runner.run for name, runner in runners.items()}, device, 0.0, rounds, warm_up=0)
    except Exception as error:
        return {name: {"error": f"while the arms took turns: {brief(error)}"} for name in runners}
    figures = {}
    for name, runner in runners.items():
        low, median, high = quantiles(times[name])
        try:
            figures[name] = {
                "median_s": rounded(median),
                "p20_s": rounded(low),
                "p80_s": rounded(high),
                "rounds": len(times[name]),
                "peak_bytes": runner.peak_bytes(device) if with_memory else None,
                "flops": _flops(name, runner),
                "round_trip": rounded(runner.model.round_trip(runner)) if isinstance(runner.model, Ours) else None,
            }
        except Exception as error:
            figures[name] = {"error": brief(error)}
    return figures


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors: of a gradient in the 2-norm, of the others in the largest element."""
    errors = {}
    for what, value in expected.items():
        order = 2 if what == "gradient" else float("inf")
        difference = (found[what].double() - value.double()).flatten()
        errors[what] = float(torch.linalg.vector_norm(difference, order) / torch.linalg.vector_norm(value.flatten(), order))
    return errors


def _flops(name: str, runner: Arm) -> int | None:
    """FLOPs of convolutions and matrix products. A CPU's fused operators do not show: ours are counted with the reference's."""
    if name in (ACCELERATED, COMPILED) or isinstance(runner.model, Captured):
        return None
    options = getattr(runner.model, "options", None)
    try:
        if options is not None:
            runner.model.options = replace(options, backend="reference")
        if isinstance(runner.model, Conditioned):
            runner.run()  # conditioned once more, for these options
        with FlopCounterMode(display=False) as counter:
            runner.run()
    finally:
        if options is not None:
            runner.model.options = options
    return counter.get_total_flops()


def convolution_rate(device: str) -> float:
    """FLOP/s of the fastest of a few large float32 convolutions: what a floor is computed with."""
    rates = []
    with torch.no_grad():
        for inputs, outputs, size, layout in (
            (320, 2048, 40, torch.contiguous_format), (320, 2048, 40, torch.channels_last), (192, 64, 80, torch.channels_last),
        ):  # fmt: skip
            x = torch.randn(1, inputs, size, size, device=device).contiguous(memory_format=layout)
            weight = torch.randn(outputs, inputs, 3, 3, device=device).contiguous(memory_format=layout)
            call = {"": lambda x=x, weight=weight: torch.nn.functional.conv2d(x, weight, padding=1)}
            fastest = min(side_by_side(call, device, 0.0, 7)[""])
            rates.append(2 * 9 * inputs * outputs * size**2 / fastest)
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the command is stored in the rows
    )
    parser.add_argument("--published", type=Path, help="checkout of the published NCSR repository; left out without one")
    parser.add_argument(
        "--tasks", nargs="+", action=Gathered, choices=[task.name for task in TASKS], help="default: what the device can do"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        action=Gathered,
        help=f"of {'; '.join(_NAMES)} (captured ones need a GPU; default: all of them)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain path too: minutes a task")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--threads", type=thread_count, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--tf32", action="store_true", help="let the published program and the plain path have TF32 convolutions on a GPU"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the JSON rows (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.device(args.device).type == "cuda"
    torch.backends.cudnn.allow_tf32 = args.tf32

    where = provenance(args.device)
    model = random_model(args.device)
    wanted = args.arms or _NAMES
    if unknown := [name for name in wanted if name not in _NAMES]:
        parser.error(f"no arm {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, _NAMES))}")
    arms: dict[str, Any] = {}
    if args.published:
        for name in (PUBLISHED, ACCELERATED):
            accelerated = name == ACCELERATED
            arms[name] = PublishedNCSR(args.published, model.published_state_dict(), args.device, accelerated)
    arms |= {name: Ours(model, *variant) for name, variant in LADDER.items() if cuda or not name.endswith("tf32")}
    arms[CONDITIONED] = Conditioned(model, LADDER[OURS].options)
    if args.compile:
        arms[COMPILED] = Ours(model, *LADDER["plain"], compiled=True)
    if cuda:
        arms |= {name: Captured(model, options) for name, options in CAPTURED.items()}
    arms = {name: arm for name, arm in arms.items() if name in wanted or name == COMPILED}
    tasks = [task for task in TASKS if task.name in (args.tasks or (ON_GPU if cuda else ON_CPU))]
    tasks = [task for task in tasks if any(map(task.can_be_done_by, arms))]
    if not tasks:
        parser.error(f"none of the arms {', '.join(map(repr, wanted))} can be measured on {args.device} with what was given")

    where["conv_flops_per_s"] = convolution_rate(args.device)
    where["command"] = recorded_command("ncsr_fast.benchmarks.end_to_end", sys.argv[1:], {args.published: "PATH"})
    stored = args.out / f"end_to_end-{args.device}.json"
    others = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    others = [row for row in others if row["task"] not in {task.name for task in tasks}]  # what is not measured now is kept
    rows: list[dict[str, Any]] = []
    for task in tasks:
        own = {name: arm for name, arm in arms.items() if task.can_be_done_by(name)}
        rows += [row | where for row in measure(task, model, own, args.device, args.rounds, not args.no_memory, args.tf32)]
        with atomic_write(stored) as path:  # after every task: a stopped run keeps it
            path.write_text(to_json(others + rows), encoding="utf-8")
    print(end_to_end_table(rows))
    failed = [f"{row['task']}, {row['arm']}: {row['error']}" for row in rows if "error" in row]
    if failed:
        raise ValueError("\n  ".join([f"{len(failed)} arms failed", *failed]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
