"""A whole run: choose the cases, then check, measure and store one after the other."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ncsr_fast import ops
from ncsr_fast.cli._common import check_file, check_folder, pick_device
from ncsr_fast.files import atomic_write
from ncsr_fast.places import check_apart

from . import report
from .harness import COMPILED, DIRECTIONS, REFERENCE, Case, brief, compiled, error_row, fault, measure
from .provenance import provenance
from .registry import DTYPES, LAYOUTS, OPERATORS, USES, functions


def run(args: argparse.Namespace) -> None:
    """Do what `ncsr-fast bench` asks for.

    A result that is wrong, or an arm that raises, has a row with its `error` and no figure; the others are measured.

    Raises:
        ValueError: At the end, for those rows; at once for arguments of which nothing can be measured.
    """
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
    shapes_to_compile = _chosen("shape", args.compile_shapes or (), USES)
    rounds, seconds = (3, 0.0) if args.quick else (args.rounds, args.seconds)

    name = re.sub(r"\W+", "-", where["device"]).lower() if cuda else "cpu"
    path = Path(args.out) / f"operators-{name}{'-quick' * args.quick}.json"
    rows: list[dict[str, Any]] = []
    for case, backends in tqdm(plan, desc="measure", unit="case", disable=None):
        with_compile = not args.no_compile and _compile_is_a_baseline(case, shapes_to_compile)
        for row in _case_rows(case, backends, directions, with_compile, seconds, rounds):
            rows.append({**row, **where, "command": _command(row, where, device)})
        with atomic_write(path) as temporary:  # after every case: a run that is stopped keeps what it has
            temporary.write_text(report.to_json(rows), encoding="utf-8")
    print(report.table(rows))
    print(f"\n{len(rows)} rows in {path}")
    failed = dict.fromkeys(row["error"] for row in rows if "error" in row)
    if failed:
        raise ValueError("\n  ".join([f"{len(failed)} failed, and {'has' if len(failed) == 1 else 'have'} no figure", *failed]))


def _case_rows(
    case: Case, backends: list[str], directions: list[str], with_compile: bool, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """The rows of a case: figures of what gives the right results, and the error of what does not."""
    functions = {name: case.function(name) for name in backends}
    if with_compile:
        functions[COMPILED] = compiled(case)
    faults = {name: fault(case, name, function) for name, function in functions.items()}
    right = {name: function for name, function in functions.items() if not faults[name]}
    wanted = [direction for direction in case.directions if direction in directions]
    rows = [error_row(case, way, name, text) for name, text in faults.items() if text for way in wanted]
    try:
        return measure(case, right | {REFERENCE: case.function(REFERENCE)}, directions, seconds, rounds) + rows
    except Exception as error:  # of all arms: more memory than there is, say
        text = f"{case}: {brief(error)}"
        return [error_row(case, way, name, text) for name in (*right, REFERENCE) for way in wanted] + rows


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    uses = ["quick"] if args.quick and not args.shapes else _chosen("shape", args.shapes or _default_shapes(device), USES)
    directions = _chosen("direction", args.directions, DIRECTIONS)
    dtypes, layouts = _chosen("dtype", args.dtype, DTYPES), _chosen("layout", args.layout, LAYOUTS)
    cases = [
        Case(operator, inverse, shape, dtype, layout, device)
        for operator in _operators(args.operators)
        for shape in OPERATORS[operator].shapes(uses)
        for dtype in (dtypes if OPERATORS[operator].of_images else ["float32"])
        for layout in (layouts if OPERATORS[operator].of_images else ["NCHW"])
        for inverse in ((False, True) if OPERATORS[operator].invertible else (False,))
    ]
    cases = [case for case in cases if not set(case.directions).isdisjoint(directions)]
    if not cases:
        raise ValueError(
            f"nothing to measure: the operators have no {' or '.join(directions)} at {', '.join(uses)} "
            "(backward passes are measured at training shapes, gaussian_split where a level ends in a split)"
        )
    return cases


def _operators(names: Sequence[str] | None) -> list[str]:
    """The entries of the registry of these names: an entry's, or a function's that has several."""
    several = functions()
    chosen = _chosen("operator", names or OPERATORS, [*OPERATORS, *several])
    return list(dict.fromkeys(entry for name in chosen for entry in several.get(name, [name])))


def _default_shapes(device: str) -> list[str]:
    names = ["x4-train", "x8-train", "sample", "large"]
    return names if torch.device(device).type == "cpu" else [*names, "div2k"]


def _compile_is_a_baseline(case: Case, shapes: Sequence[str]) -> bool:
    """At the shapes asked for; else at those of ×4, in the direction a model goes there, to save minutes of compilation."""
    uses = {user.split()[0] for user in case.shape.used_by}
    if shapes:
        return not uses.isdisjoint(shapes)
    forward = not case.entry.invertible or case.inverse != case.shape.training
    return forward and not uses.isdisjoint({"x4-train", "sample"})


def _backends(case: Case, names: Sequence[str] | None) -> list[str]:
    """The backends to compare with the reference: of those asked for, or of all there are for the device and dtype, those
    that have the operator."""
    states = ops.backends(case.device, DTYPES[case.dtype][0])
    if names is None:
        interpreted = {"triton"} if torch.device(case.device).type == "cpu" else set()  # nobody's way to compute
        names = [name for name, state in states.items() if state.available and name not in interpreted]
    for name in _chosen("backend", names, states):
        if not states[name].available:
            raise ValueError(f"backend {name!r} is not available: {states[name].reason}")
    return [name for name in names if name != REFERENCE and _has_operator(name, case)]


def _has_operator(backend: str, case: Case) -> bool:
    shape = replace(case.shape, size=(1, case.shape.size[1], 1, 1)) if case.entry.of_images else case.shape
    inputs, _ = replace(case, shape=shape).draw()
    try:
        ops.resolve_backend(case.entry.function or case.operator, backend, inputs[case.entry.decisive or next(iter(inputs))])
    except ops.BackendUnavailable:
        return False
    return True


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
