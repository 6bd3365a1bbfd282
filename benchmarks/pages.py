"""The tables and plots of README and docs, written from the stored rows.

    python -m ncsr_fast.benchmarks.pages           # write them
    python -m ncsr_fast.benchmarks.pages --check   # exit status 1 where a page says something else than the rows

A table stands between the lines `<!-- figures: NAME -->` and `<!-- end of figures -->` of a page, NAME being one of `TABLES`.
`make figures` measures the rows anew, on one idle machine, and then writes the pages.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ncsr_fast.figures import save_figure
from ncsr_fast.files import atomic_write

from .arms import ACCELERATED, CONDITIONED, OURS, PUBLISHED
from .family import STORED
from .harness import REFERENCE
from .report import compared, markdown, speed_up
from .sizes import COMPACT, FULL, TILED

Row = dict[str, Any]
RESULTS = Path("benchmarks/results")
PAGES = (Path("README.md"), *(Path("docs") / name for name in ("drop-in.md", "family.md", "operators.md", "performance.md")))
WHOLE_MODELS, OPERATORS = RESULTS / "end_to_end-cpu.json", RESULTS / "operators-cpu.json"
FAMILY = RESULTS / STORED
IMAGE_SIZES = RESULTS / "sizes-cpu.json"
_TASKS = {
    "sample": "10 samples, LR 40×40",
    "train": "training step, 160×160",
    "train-frozen": "training step, encoder frozen",
}
_STEPS = {  # of the engine, as pages name what `LADDER` turns on one after the other
    PUBLISHED: "published program",
    "plain": "plain",
    "+ hoisting": "+ hoisting, one gradient a level, dense blocks without copies",
    "+ sub-pixel": "+ upsampled features convolved at LR resolution",
    "+ channels-last": "+ channels-last",
    "+ fused operators": "+ fused operators",
    "+ winograd": "+ Winograd",
    OURS: "+ recomputed hidden layers = ncsr_fast",
}
_SHAPES = (
    ("forward", [1, 12, 80, 80]),
    ("inverse", [1, 12, 80, 80]),
    ("forward", [18, 12, 80, 80]),
    ("backward", [18, 12, 80, 80]),
)
_SHOWN = ("actnorm_invconv", "affine_injector", "affine_coupling", "gaussian_split", "flow_step")
_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)


def rows_of(path: Path) -> list[Row]:
    """The stored rows that have figures."""
    return [row for row in json.loads(path.read_text(encoding="utf-8")) if "error" not in row]


def arms(task: str) -> dict[str, Row]:
    """The rows of a whole-model task by arm."""
    return {row["arm"]: row for row in rows_of(WHOLE_MODELS) if row["task"] == task}


def machine(row: Row) -> str:
    """The machine and versions of a row in words."""
    processor = row.get("cpu") or row["device"]
    set_ = f" with {row['instruction_set'].upper()}" if row.get("instruction_set") else ""
    return f"{processor.split(',')[0]}{set_}, {row['threads']} cores, torch {row['torch'].split('+')[0]}, {row['date']}"


def headline() -> str:
    """Published program and ncsr_fast side by side, in the tasks that people wait for."""
    lines = [("`ncsr-x4`, float32, results equal to rounding", "published program", "ncsr_fast")]
    row: Row = {}
    for task, name in _TASKS.items():
        before, row = arms(task)[PUBLISHED], arms(task)[OURS]
        memory = [f", {_mib(each)}" if task == "train" else "" for each in (before, row)]
        lines.append((name, _seconds(before) + memory[0], f"{_seconds(row)} ({_ratio(before, row)}){memory[1]}"))
    return f"{markdown(lines)}\n\nMeasured on: {machine(row)}."


def ladder() -> str:
    """The table of times as the parts of the engine are turned on one after the other."""
    lines = [("", "10 samples, LR 40×40", "training step, 160×160", "its activations")]
    samples, steps = arms("sample"), arms("train")
    for arm, name in _STEPS.items():
        cells = [f"{_seconds(found[arm])} ({_ratio(found[PUBLISHED], found[arm])})" for found in (samples, steps)]
        lines.append((name, *cells, _mib(steps[arm])))
    return f"{markdown(lines)}\n\nMeasured on: {machine(steps[OURS])}, commit {steps[OURS]['commit']}."


def others() -> str:
    """The tasks beside those of the ladder."""
    lines = [("", "published program", "plain", "ncsr_fast")]
    for task in ("sample-one", "train-frozen", "train-batch-2", "decode-gradient"):
        found = arms(task)
        if OURS in found:
            cells = [_seconds(found[arm]) if arm in found else "" for arm in (PUBLISHED, "plain")]
            ratio = f" ({_ratio(found[PUBLISHED], found[OURS])})" if PUBLISHED in found else ""
            again = f"; conditioned once {_seconds(found[CONDITIONED])}" if CONDITIONED in found else ""
            lines.append((found[OURS]["what"], *cells, _seconds(found[OURS]) + ratio + again))
    return markdown(lines)


def accelerated() -> str:
    """The published program before and after `accelerate`."""
    lines = [("", "published program", "accelerated")]
    row: Row = {}
    for task, name in _TASKS.items():
        before, row = arms(task)[PUBLISHED], arms(task)[ACCELERATED]
        lines.append((name, _seconds(before), f"{_seconds(row)} ({_ratio(before, row)})"))
    return f"{markdown(lines)}\n\nMeasured on: {machine(row)}."


def family() -> str:
    """Every member that was measured: its published program, before and after `accelerate`, and our model."""
    if not FAMILY.exists():
        return "Not measured yet."
    lines = [("", "published program", "accelerated", "ncsr_fast")]
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    row: Row = {}
    for row in rows_of(FAMILY):
        cells.setdefault((row["system"], row["what"]), {})[row["arm"]] = row
    for (system, what), found in cells.items():
        if PUBLISHED in found:
            own = [found.get(arm) for arm in (ACCELERATED, OURS)]
            times = [f"{_seconds(each)} ({_ratio(found[PUBLISHED], each)})" if each else "" for each in own]
            lines.append((f"`{system}`, {what}", _seconds(found[PUBLISHED]), *times))
    return f"{markdown(lines)}\n\nMeasured on: {machine(row)}."


def operators() -> str:
    """Times of the native operators, and their ratio to eager PyTorch."""
    found = {
        (row["operator"], row["direction"], *row["shape"]): (row, eager)
        for row, eager, _ in compared(rows_of(OPERATORS))
        if row["backend"] != REFERENCE and row["dtype"] == "float32" and row["layout"] == "NCHW" and eager is not None
    }
    lines = [("", *(f"{direction}, {'×'.join(map(str, shape))}" for direction, shape in _SHAPES))]
    row: Row = {}
    for operator in _SHOWN:
        cells = []
        for direction, shape in _SHAPES:
            row, eager = found[(operator, direction, *shape)]
            cells.append(f"{_milliseconds(row)} ({speed_up(row, eager):.1f}×)")
        lines.append((f"`{operator}`", *cells))
    return f"{markdown(lines)}\n\nMeasured on: {machine(row)}."


def sizes() -> str:
    """Images of growing size by the compact model, whole and in tiles."""
    return _by_size(COMPACT, (OURS, TILED), {OURS: "whole", TILED: "in tiles"})


def sizes_published() -> str:
    """Images of growing size by the x4 model, beside the published program."""
    return _by_size(FULL, (PUBLISHED, OURS), {PUBLISHED: "published", OURS: "ncsr_fast"})


def _by_size(model: str, arms: tuple[str, ...], names: dict[str, str]) -> str:
    """A line for each size: by every arm the first image, a further one, and decoding with its gradient."""
    if not IMAGE_SIZES.exists():
        return "Not measured yet: `python -m ncsr_fast.benchmarks.sizes` does."
    rows = [row for row in json.loads(IMAGE_SIZES.read_text(encoding="utf-8")) if row["model"] == model]
    found = {(row["side"], row["task"], row["arm"]): row for row in rows}
    columns = [("sample", arm, key) for key in ("seconds", "further_s") for arm in arms]
    columns += [("gradient", arm, "seconds") for arm in arms if any(key[1:] == ("gradient", arm) for key in found)]
    kinds = {("sample", "seconds"): "an image", ("sample", "further_s"): "a further one", ("gradient", "seconds"): "gradient"}
    lines = [("", *(f"{kinds[task, key]}, {names[arm]}" for task, arm, key in columns))]
    for side in sorted({row["side"] for row in rows}):
        cells = [_figure(found.get((side, task, arm), {}), key) for task, arm, key in columns]
        lines.append((f"{side}×{side}", *cells))
    return f"{markdown(lines)}\n\nMeasured on: {machine(rows[0])}."


def _figure(row: Row, key: str) -> str:
    """Seconds of a row, with its memory where they are of all that it was measured of."""
    if key not in row:
        return row.get("error", "")
    return f"{row[key]:.3g} s" + (f", {_mib(row)}" if key == "seconds" else "")


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline, "ladder": ladder, "others": others, "accelerated": accelerated, "operators": operators,
    "family": family,
    "sizes": sizes, "sizes-published": sizes_published,
}  # fmt: skip


def plot_ladder(path: Path) -> None:
    """Seconds of ten samples and of a training step, arm by arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, 2, sharey=True), ("sample", "train")):
        found = arms(task)
        names, times = list(_STEPS.values()), [found[arm]["median_s"] for arm in _STEPS]
        bars = axes.barh(names, times, color=["#9aa5b1"] + ["#3b6ea5"] * (len(names) - 1))
        axes.bar_label(bars, [_seconds(found[arm]) for arm in _STEPS], padding=3, fontsize=8)
        axes.set(title=_TASKS[task], xlabel="seconds", xlim=(0, 1.18 * max(times)))
        axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    save_figure(figure, path, dpi=120)


def written(page: Path) -> str:
    """The text of a page with its tables as the rows have them now."""
    text = page.read_text(encoding="utf-8")
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


def _seconds(row: Row) -> str:
    return f"{row['median_s']:.3g} s"


def _milliseconds(row: Row) -> str:
    value = row["median_ms"]
    return f"{1000 * value:.0f} µs" if value < 1 else f"{value:.2g} ms"


def _ratio(before: Row, row: Row) -> str:
    ratio = before["median_s"] / row["median_s"]
    return f"{ratio:.1f}×" if ratio >= 3 else f"{ratio:.2f}×"


def _mib(row: Row) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ncsr_fast.benchmarks.pages", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs from the rows")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        text = written(page)
        if text != page.read_text(encoding="utf-8"):
            stale.append(str(page))
            if not args.check:
                with atomic_write(page) as path:
                    path.write_text(text, encoding="utf-8")
    if args.check and stale:
        raise ValueError(f"{', '.join(stale)}: not what the stored rows say; python -m ncsr_fast.benchmarks.pages writes them")
    if not args.check:
        plot_ladder(Path("docs/images/ladder.png"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, KeyError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
