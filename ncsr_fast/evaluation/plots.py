"""Plots of a table: perception, diversity and consistency against each other, and over temperature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsr_fast.evaluation.tables import Table, printed_numbers
from ncsr_fast.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CONSISTENT = 45  # dB of LR-PSNR that the challenge asks for
_RANGE = (25, 55)  # dB, of the colours
_DPI = 130


def write_plots(table: Table, scale: int, folder: Path) -> list[Path]:
    """Write table{number}-tradeoff.png, and table{number}-temperatures.png where rows were measured at several temperatures.

    Args:
        table: With its rows measured.
        scale: Of the challenge's teams that are drawn.
        folder: That they are written to.

    Returns:
        The files.

    Raises:
        ImportError: There is no matplotlib.
        OSError: They cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'ncsr_fast[train]'") from error
    files = [folder / f"table{table.number}-tradeoff.png"]
    figure = Figure(figsize=(7, 5), layout="constrained")
    _tradeoff(figure.add_subplot(), table, scale)
    save_figure(figure, files[0], _DPI)
    swept = {row.name: row.sweep for row in table.rows if len(row.sweep) > 1}
    if swept:
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, metric, label in zip(figure.subplots(1, 2), ("diversity", "lpips"), ("diversity, %", "LPIPS")):
            _over_temperature(axes, swept, metric, label)
        files.append(folder / f"table{table.number}-temperatures.png")
        save_figure(figure, files[1], _DPI)
    return files


def _tradeoff(axes: Axes, table: Table, scale: int) -> None:
    teams = printed_numbers()["challenge"].get(str(scale), {"rows": {}})["rows"]
    measured = {row.name: row.report.means() for row in table.rows if row.report}
    kinds: list[tuple[str, Mapping[str, Mapping[str, Any]], str]] = [
        ("NTIRE 2021 teams, printed", teams, "^"),
        ("printed", {row.name: row.printed for row in table.rows}, "s"),
        ("measured", measured, "o"),
    ]
    colours = None
    for label, rows, marker in kinds:
        points = {
            name: row
            for name, row in rows.items()
            if all(row.get(key) is not None for key in ("lpips", "diversity", "lr_psnr"))
        }
        if not points:
            continue
        columns = [[row[key] for row in points.values()] for key in ("lpips", "diversity", "lr_psnr")]
        low, high = _RANGE
        style = {
            "c": columns[2],
            "vmin": low,
            "vmax": high,
            "cmap": "viridis",
            "marker": marker,
            "edgecolors": "black",
            "label": label,
        }
        colours = axes.scatter(columns[0], columns[1], s=30 if marker == "^" else 60, **style)
        for name, x, y in zip(points, *columns[:2]):
            axes.annotate(
                name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6 if marker == "^" else 8, parse_math=False
            )
    axes.set_xlabel("LPIPS (lower is better)")
    axes.set_ylabel("diversity, %")
    axes.set_title(f"Table {table.number}")
    if colours is not None:
        axes.figure.colorbar(colours, ax=axes, label=f"LR-PSNR, dB (the challenge asks for {_CONSISTENT})", extend="both")
        axes.legend(fontsize=8)


def _over_temperature(axes: Axes, swept: Mapping[str, Mapping[float, Any]], metric: str, label: str) -> None:
    for name, sweep in swept.items():
        points = [(temperature, mean) for temperature, report in sweep.items() if (mean := report.means()[metric]) is not None]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=4, label=name)
    axes.set_xlabel("temperature")
    axes.set_ylabel(label)
    if axes.get_lines():
        axes.legend(fontsize=8)
