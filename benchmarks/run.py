"""A whole run: choose the cases, check them all, then measure and store row after row."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ncsr_fast import ops
from ncsr_fast.cli._common import check_file, check_folder, pick_device
from ncsr_fast.files import atomic_write
from ncsr_fast.places import check_apart

from . import report
from .harness import DIRECTIONS, REFERENCE, Case, measure, wrong_results
from .provenance import provenance
from .registry import DTYPES, LAYOUTS, OPERATORS, USES


def run(args: argparse.Namespace) -> None:
    """What `ncsr-fast bench` does. Raises ValueError, and prints and stores no figure, when a result is wrong."""
    if args.table or args.plot:
        if args.table:
            print(report.table(report.stored_rows(args.table)))
        if args.plot:
            source, picture = args.plot
            check_file("--plot", picture)
            check_apart({"--plot": [picture]}, {"the rows": [source]})
            report.plot(report.stored_rows(source), picture)
        return
    check_folder("--out", args.out)
    device = pick_device(args.device)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if args.threads:
        torch.set_num_threads(args.threads)
    where = provenance(device)
    plan = [(case, _backends(case, args.backends)) for case in _cases(args, device)]
    directions = _chosen("direction", args.directions, DIRECTIONS)
    compiled = _chosen("shape", args.compile_shapes or (), USES)
    rounds, seconds = (3, 0.0) if args.quick else (args.rounds, args.seconds)

    complaints = []
    for case, backends in tqdm(plan, desc="check", unit="case", disable=None):
        complaints += wrong_results(case, {backend: case.function(backend) for backend in backends})
    if complaints:
        raise ValueError("\n  ".join([f"{len(complaints)} results are wrong, so nothing is timed", *complaints]))

    name = re.sub(r"\W+", "-", where["device"]).lower() if cuda else "cpu"
    path = Path(args.out) / f"operators-{name}{'-quick' * args.quick}.json"
    rows: list[dict[str, Any]] = []
    for case, backends in tqdm(plan, desc="measure", unit="case", disable=None):
        with_compile = not args.no_compile and _compile_is_a_baseline(case, compiled)
        for row in measure(case, backends, directions, with_compile, seconds, rounds):
            rows.append({**row, **where, "command": _command(row, where, device)})
        with atomic_write(path) as temporary:  # after every case: a run that is stopped keeps what it has
            temporary.write_text(report.to_json(rows), encoding="utf-8")
    print(report.table(rows))
    print(f"\n{len(rows)} rows in {path}")


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    uses = ["quick"] if args.quick and not args.shapes else _chosen("shape", args.shapes or _default_shapes(device), USES)
    directions = _chosen("direction", args.directions, DIRECTIONS)
    cases = [
        Case(operator, inverse, shape, dtype, layout, device)
        for operator in _chosen("operator", args.operators or ops.OPERATORS, ops.OPERATORS)
        for shape in OPERATORS[operator].shapes(uses)
        for dtype in _chosen("dtype", args.dtype, DTYPES)
        for layout in _chosen("layout", args.layout, LAYOUTS)
        for inverse in (False, True)
    ]
    cases = [case for case in cases if not set(case.directions).isdisjoint(directions)]
    if not cases:
        raise ValueError(
            f"nothing to measure: the operators have no {' or '.join(directions)} at {', '.join(uses)} "
            "(backward passes are measured at training shapes, gaussian_split where a level ends in a split)"
        )
    return cases


def _default_shapes(device: str) -> list[str]:
    names = ["x4-train", "x8-train", "sample", "large"]
    return names if torch.device(device).type == "cpu" else [*names, "div2k"]


def _compile_is_a_baseline(case: Case, shapes: Sequence[str]) -> bool:
    """At the shapes asked for; else at those of ×4, in the direction a model goes there, to save minutes of compilation."""
    uses = {user.split()[0] for user in case.shape.used_by}
    if shapes:
        return not uses.isdisjoint(shapes)
    return case.inverse != case.shape.training and not uses.isdisjoint({"x4-train", "sample"})


def _backends(case: Case, names: Sequence[str] | None) -> list[str]:
    """The backends to compare with the reference: those asked for, or all there are for the device and dtype."""
    states = ops.backends(case.device, DTYPES[case.dtype][0])
    if names is None:
        interpreted = {"triton"} if torch.device(case.device).type == "cpu" else set()  # nobody's way to compute
        return [name for name, state in states.items() if state.available and name not in {REFERENCE} | interpreted]
    for name in _chosen("backend", names, states):
        if not states[name].available:
            raise ValueError(f"backend {name!r} is not available: {states[name].reason}")
    return [name for name in names if name != REFERENCE]


def _chosen(kind: str, names: Iterable[str], valid: Iterable[str]) -> list[str]:
    """The names, without repetitions. Raises ValueError for one that is not valid."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in valid:
            raise ValueError(f"no {kind} {name!r}; there are {', '.join(valid)}")
    return chosen


def _command(row: dict[str, Any], where: dict[str, Any], device: str) -> str:
    """The command that measures this row alone."""
    options = {
        "operators": row["operator"],
        "shapes": row["used_by"][0].split()[0],
        "directions": row["direction"],
        "dtype": row["dtype"],
        "layout": row["layout"],
        "device": torch.device(device).type,
        "threads": where["threads"],
    }
    return shlex.join(["ncsr-fast", "bench", *(str(word) for key, value in options.items() for word in (f"--{key}", value))])
