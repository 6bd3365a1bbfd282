"""Views of a run: what failed, what is slow and why, and the table of the README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ncsr_fast.benchmarks.report import markdown

from .session import some_of

Row = dict[str, Any]

_SHARE_OF_COPY, _SHARE_OF_PRODUCT = 0.85, 0.5  # below it an operator, a convolution is listed as slow
_LISTED = 12  # of what is slow, and of the kernels of a profile
_ERROR_LINES = 3
_CHECKS = ("kernels", "engine", "capture-step", "capture-sampler")  # nothing is published of a run in which one failed


def summary(rows: list[Row]) -> str:
    """Text in sections; one that has nothing to say is left out."""
    sections = {
        "machine": _machine(rows),
        "failed": _failed(rows),
        "skipped": [f"{_name(row)}: {row['error']}" for row in rows if row["ok"] is None],
        "errors beside the plain path in float32": list(_lines(rows, "engine")),
        "linear algebra": [*_lines(rows, "linear-algebra"), *_lines(rows, "linear-algebra-captured")],
        "times": list(_times(rows)),
        "where the time goes": list(_profiles(rows)),
        "slow operators and step kernels, as a share of a copy": _slow_operators(rows),
        "slow convolutions, as a share of the bf16 product": _slow_convolutions(rows),
        "tests and trainer": [*_lines(rows, "tests"), *_lines(rows, "trainer")],
    }
    dry = ["this was a dry run: no time in it means anything", ""] if any(row["dry"] for row in rows) else []
    blocks = ["\n".join([f"## {title}", *lines]) for title, lines in sections.items() if lines]
    return "\n".join(dry) + "\n\n".join(blocks)


def readme_table(rows: list[Row]) -> str:
    """Markdown of what a user waits for, beside the published program.

    Raises:
        ValueError: For the results of a dry run, of a run whose checks failed, and where nothing of it was measured.
    """
    if any(row["dry"] for row in rows):
        raise ValueError("these are the results of a dry run, whose times mean nothing")
    if wrong := list(dict.fromkeys(row["item"] for row in rows if row["ok"] is False and row["item"] in _CHECKS)):
        raise ValueError(f"{', '.join(wrong)} failed in this run: there is no table of results that are wrong")
    machine = _figures(rows, "ceilings", "machine")
    if not machine:
        raise ValueError("what machine these results are of is not among them: the item ceilings was left out, or failed")
    arms = {"published program, TF32": None, "ncsr_fast, TF32": "tf32", "ncsr_fast, bf16": "bf16"}
    lines = []
    for label, item, part in (
        ("10 samples, LR 40×40", "sampling", "samples, LR 40×40"),
        ("10 samples, LR 340×510", "sampling-div2k", "samples, LR 340×510"),
        ("training step, batch 18 of 160×160", "training", "training step"),
    ):
        times = [
            _seconds(_figures(rows, "published", f"{part}, as it is") if arm is None else _figures(rows, item, f"{arm}, graph"))
            for arm in arms.values()
        ]
        if any(times[1:]):
            lines.append((label, *(_cell(seconds, times[0], index) for index, seconds in enumerate(times))))
    if not lines:
        raise ValueError("neither samples nor training steps were measured in this run")
    setting = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "cuda", "commit", "date") if machine.get(key))
    head = (f"`ncsr-x4`, {machine['device']}", *arms)
    return f"{markdown([head, *lines])}\n\n{setting}; `{machine['command']}`"


def _seconds(figures: Row) -> float | None:
    """Seconds of ten samples, or of a training step; None where there are no figures."""
    if "median_s" not in figures:
        return None
    return figures["median_s"] * (10 / figures["samples"] if "samples" in figures else 1)


def _cell(seconds: float | None, published: float | None, index: int) -> str:
    if seconds is None:
        return "–"
    text = f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
    return f"{text} ({published / seconds:.1f}×)" if index and published else text


def _figures(rows: list[Row], item: str, part: str) -> Row:
    """Figures of a part that succeeded; {} where there is none."""
    return next((row["figures"] for row in rows if (row["item"], row["part"]) == (item, part) and row["ok"]), {})


def _name(row: Row) -> str:
    return row["item"] if row["part"] is None else f"{row['item']}, {row['part']}"


def _parts(rows: list[Row], item: str) -> list[Row]:
    return [row for row in rows if row["item"] == item and row["part"] is not None and row["ok"]]


def _lines(rows: list[Row], item: str) -> Iterator[str]:
    for row in _parts(rows, item):
        yield f"{row['part']}: " + (", ".join(f"{name} {value}" for name, value in row["figures"].items()) or "ok")


def _machine(rows: list[Row]) -> list[str]:
    machine = _figures(rows, "ceilings", "machine")
    known = [f"{key} {machine[key]}" for key in ("device", "torch", "triton", "cuda", "commit", "date") if machine.get(key)]
    return [", ".join(known)] * bool(known) + [line for line in _lines(rows, "ceilings") if not line.startswith("machine")]


def _failed(rows: list[Row]) -> list[str]:
    """The ends of errors, each with all that failed with it; not that an item failed because a part of it did."""
    named: dict[str, list[str]] = {}
    parts = {row["item"] for row in rows if row["ok"] is False and row["part"] is not None}
    for row in (row for row in rows if row["ok"] is False):
        if row["part"] is not None or row["item"] not in parts or "of its parts failed" not in row["error"]:
            end = "\n    ".join(line.strip() for line in row["error"].strip().splitlines()[-_ERROR_LINES:])
            named.setdefault(end, []).append(_name(row))
    return [f"{some_of(names)}:\n    {end}" for end, names in named.items()]


def _times(rows: list[Row]) -> Iterator[str]:
    for item in ("training", "training-variants", "sampling", "sampling-div2k", "published"):
        for row in (row for row in _parts(rows, item) if "median_s" in row["figures"]):
            figures = row["figures"]
            peak = "" if figures["peak_bytes"] is None else f", {figures['peak_bytes'] / 2**30:.2f} GiB"
            yield (
                f"{_name(row)}: {1e3 * figures['median_s']:.4g} ms ({1e3 * figures['p20_s']:.4g}–{1e3 * figures['p80_s']:.4g}, "
                f"first {figures['first_s']:.3g} s{peak})"
            )


def _profiles(rows: list[Row]) -> Iterator[str]:
    for row in (*_parts(rows, "training-profile"), *_parts(rows, "sampling-profile")):
        figures = row["figures"]
        span, busy = figures["span_s"], figures["busy_s"]
        counts = f"{figures['kernels']} kernels by {figures['launches']} launches"
        yield f"{_name(row)}: {counts}; {1e3 * busy:.4g} ms of work in {1e3 * span:.4g} ms"
        for name, count, microseconds, share in figures["top"][:_LISTED]:
            yield f"    {share:6.1%} {1e-3 * microseconds:9.3f} ms {count:6} × {name}"


def _slow_operators(rows: list[Row]) -> list[str]:
    copy = _figures(rows, "ceilings", "copy").get("gb_per_s")
    shares = {}
    for row in _parts(rows, "operators"):
        for name, value in row["figures"].items():
            if isinstance(value, dict):
                shares[f"{row['part']}, {name}"] = value["share_of_copy"]
            elif name.endswith("_gb_per_s") and copy:
                shares[f"{row['part']}, {name.removesuffix('_gb_per_s')}"] = value / copy
    ours = {name: share for name, share in shares.items() if not name.endswith("reference")}
    return _slowest(ours, _SHARE_OF_COPY)


def _slow_convolutions(rows: list[Row]) -> list[str]:
    product = _figures(rows, "ceilings", "bf16 product").get("tflop_per_s")
    shares = {
        f"{row['part']}, {name.removesuffix('_tflop_per_s')}": value / product
        for row in _parts(rows, "convolutions")
        for name, value in row["figures"].items()
        if product and name.endswith("_tflop_per_s")
    }
    return _slowest(shares, _SHARE_OF_PRODUCT)


def _slowest(shares: dict[str, float], bound: float) -> list[str]:
    slow = sorted((share, name) for name, share in shares.items() if share < bound)
    lines = [f"{share:6.1%} {name}" for share, name in slow[:_LISTED]]
    return [*lines, f"… of {len(slow)} below {bound:.0%}, {len(shares)} in all"] if slow else []
