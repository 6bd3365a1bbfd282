"""Views of stored rows: a Markdown table and a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ncsr_fast.figures import save_figure

from .harness import COMPILED, REFERENCE

Row = dict[str, Any]

# older rows lack the four after "device"
_SETTING = (
    "device", "cpu", "physical_cores", "instruction_set", "torch_instruction_set", "threads", "torch", "triton", "cuda",
    "ncsr_fast", "commit", "date",
)  # fmt: skip
# what rows must share to be compared
_CELL = ("operator", "direction", "shape", "layout", "dtype", "gradients_recorded", *_SETTING)
_HEAD = (
    *_CELL[:5], "backend", "ms (p20–p80)", "GB/s", "of copy", "peak MiB", "eager ms", "× eager", "compile ms", "× compile",
    "slower than",
)  # fmt: skip


def to_json(rows: list[Row]) -> str:
    """A list with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def stored_rows(path: str | os.PathLike) -> list[Row]:
    """The rows of operators in a file. Raises ValueError for a file of anything else."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all({*_CELL[:5], "backend"} <= row.keys() and not {"median_ms", "error"}.isdisjoint(row) for row in rows):
            raise ValueError("its rows are not of operators")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no file of rows that `ncsr-fast bench` wrote: {error}") from error
    return rows


def compared(rows: list[Row]) -> list[tuple[Row, Row | None, Row | None]]:
    """Every row of ours (of eager, where there is none) with those of the eager and the compiled reference of its cell."""
    cells: dict[tuple, dict[str, Row]] = {}
    rows = [row for row in rows if "error" not in row]
    for row in rows:
        cells.setdefault(tuple(str(row.get(key)) for key in _CELL), {})[row["backend"]] = row
    ours = [row for row in rows if row["backend"] not in (REFERENCE, COMPILED)]
    result = []
    for row in ours or [row for row in rows if row["backend"] == REFERENCE]:
        cell = cells[tuple(str(row.get(key)) for key in _CELL)]
        result.append((row, cell.get(REFERENCE), cell.get(COMPILED)))
    return result


def speed_up(row: Row, baseline: Row | None) -> float | None:
    return baseline["median_ms"] / row["median_ms"] if baseline else None


def table(rows: list[Row]) -> str:
    """Markdown, one table for every device and set of versions. Where a baseline is faster, the last column says which.

    Errors of rows without figures follow, a line each.
    """
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for row, eager, compiled in compared(rows):
        setting = ", ".join(f"{key} {row[key]}" for key in _SETTING if row.get(key) is not None)
        ratios = {"eager": speed_up(row, eager), "compile": speed_up(row, compiled)}
        line = (
            row["operator"],
            row["direction"],
            _size(row),
            row["layout"],
            row["dtype"],
            row["backend"],
            f"{_ms(row['median_ms'])} ({_ms(row['p20_ms'])}–{_ms(row['p80_ms'])})",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            _ms(eager["median_ms"]) if eager else "",
            f"{ratios['eager']:.2f}" if eager else "",
            _ms(compiled["median_ms"]) if compiled else "",
            f"{ratios['compile']:.2f}" if compiled else "",
            ", ".join(name for name, ratio in ratios.items() if ratio is not None and ratio < 1),
        )
        blocks.setdefault(setting, []).append(line)
    tables = [f"{setting}\n\n{markdown([_HEAD, *lines])}" for setting, lines in blocks.items()]
    errors = dict.fromkeys(row["error"] for row in rows if "error" in row)
    return "\n\n".join([*tables, *(["\n".join(f"failed: {error}" for error in errors)] if errors else [])])


def plot(rows: list[Row], path: str) -> None:
    """Speed-up over eager and over torch.compile, and the share of a copy's bandwidth, of every row in the table."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    entries = compared(rows)
    labels = [
        " ".join([row["operator"], row["direction"], _size(row), row["layout"], row["dtype"], row["backend"]])
        for row, _, _ in entries
    ]
    figure = Figure(figsize=(14, 2 + 0.16 * len(labels)), layout="constrained")
    speed, share = figure.subplots(1, 2, sharey=True)
    places = range(len(labels))
    for name, baselines, marker in (("eager", [entry[1] for entry in entries], "o"), ("compile", [e[2] for e in entries], "x")):
        points = [(speed_up(row, base), place) for (row, _, _), base, place in zip(entries, baselines, places) if base]
        speed.scatter(*zip(*points), marker=marker, s=14, label=f"over {name}") if points else None
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set(xscale="log", xlabel="speed-up (left of the line: slower)")
    speed.set_yticks(places, labels, fontsize=6)
    speed.margins(y=0.01)
    speed.invert_yaxis()
    speed.legend(loc="lower right")
    share.barh(places, [row["share_of_copy"] for row, _, _ in entries])
    share.axvline(1, color="black", linewidth=0.8)
    share.set(xlabel="share of the bandwidth of a copy")
    figure.suptitle(", ".join(sorted({f"{row['device']}, {row['threads']} threads, {row['commit']}" for row, _, _ in entries})))
    save_figure(figure, path, dpi=120)


def _size(row: Row) -> str:
    return "×".join(map(str, row["shape"]))


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def markdown(lines: list[tuple[str, ...]]) -> str:
    """A table of cells, the first line its head, padded to the widths of the columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def end_to_end_table(rows: list[Row]) -> str:
    """Markdown of the rows of `end_to_end`, a table a task: times, their ratio to the published program and to the
    plain path, memory, and how much of the time the FLOPs alone would take at the rate of the fastest convolution measured.
    An arm that failed has its error there."""
    blocks = []
    for task in dict.fromkeys(row["task"] for row in rows):
        arms = {row["arm"]: row for row in rows if row["task"] == task}
        first = next(iter(arms.values()))
        rate = first["conv_flops_per_s"]
        lines = [
            f"{first['what']} ({', '.join(_machine(first))}, torch {first['torch']}, convolutions {rate / 1e9:.0f} GFLOP/s)",
            "",
            "| | s (p20–p80) | × published | × plain | peak MiB | GFLOP | floor | error | round trip |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in arms.items():
            if "error" in row:
                lines.append(f"| {' | '.join([name, 'failed: ' + row['error'].replace('|', '/'), *[''] * 7])} |")
                continue
            others = [arms.get(other, {}).get("median_s") for other in ("published", "plain")]
            ratios = [f"{other / row['median_s']:.2f}" if other else "" for other in others]
            flops = row["flops"]
            cells = [
                name,
                f"{row['median_s']:.3g} ({row['p20_s']:.3g}–{row['p80_s']:.3g})",
                *ratios,
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
                "" if flops is None else f"{flops / 1e9:.0f}",
                "" if flops is None else f"{flops / rate / row['median_s']:.0%}",
                ", ".join(f"{what} {error:.1e}" for what, error in row["errors"].items()),
                "" if row["round_trip"] is None else f"{row['round_trip']:.1e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _machine(row: Row) -> list[str]:
    return [str(row[key]) for key in ("device", "instruction_set") if row.get(key) is not None]


def training_table(rows: list[Row]) -> str:
    """Markdown of the rows of `training`, a table a task."""
    provenance = {*_SETTING, "command", "task"}
    blocks = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [{key: value for key, value in row.items() if key not in provenance} for row in rows if row["task"] == task]
        lines = [tuple(own[0]), *(tuple(str(value) for value in row.values()) for row in own)]
        blocks.append(f"{task}\n\n{markdown(lines)}")
    return "\n\n".join(blocks)


def trace_table(rows: list[Row]) -> str:
    """Markdown of the rows of `trace`, a table a row with a line for each part of the pass."""
    blocks = []
    for row in rows:
        lines = [("part", "operations", "kernels", "launches", "GB", "TFLOP")]
        parts = sorted(row["parts"].items(), key=lambda part: -part[1]["launches"])
        for name, count in [*parts, ("all", row)]:
            numbers = [str(count[key]) for key in ("operations", "kernels", "launches")]
            lines.append((name, *numbers, f"{count['bytes'] / 1e9:.2f}", f"{count['flops'] / 1e12:.3f}"))
        backend = row.get("backend", "auto")  # of rows from before there was a choice
        named = f"{row['task']}, {row['precision']}" + (f", {backend}" if backend != "auto" else "")
        blocks.append(f"{named}: {row['what']}\n\n{markdown(lines)}")
    return "\n\n".join(blocks)
