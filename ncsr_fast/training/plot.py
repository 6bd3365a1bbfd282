"""A plot of the log of a training run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsr_fast.figures import save_figure
from ncsr_fast.places import check_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Points = list[tuple[int, float]]

# Okabe and Ito's colours, which colour-blind people can distinguish
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY, _GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666",
)  # fmt: skip
_OF_STAGE = {"encoder": _ORANGE, "flow": _BLUE}
_OF_TEMPERATURE = (_BLUE, _RED, _GREEN, _PURPLE, _ORANGE, _SKY)
_MARKED = 40  # curves with fewer points have a mark at each point


def plot(run: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Plot RUN/log.jsonl to `out`, by default RUN/training.png, and return the path.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: The log has no rows, or `out` is the log, or matplotlib cannot write the format of `out`.
        ImportError: Matplotlib is not installed.
    """
    run = Path(run)
    target = run / "training.png" if out is None else Path(out)
    check_apart({"out": [target]}, {"the log": [run / "log.jsonl"]})
    save_figure(draw(read_log(run), run.resolve().name), target, dpi=130)
    return target


def read_log(run: str | os.PathLike) -> list[Row]:
    """The rows of RUN/log.jsonl without a truncated last line. Raises as `plot` does, and ValueError for a bad line."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} does not exist: {str(run)!r} is not the folder of a training run that has begun"
        )
    rows, lines = [], path.read_text(errors="replace", encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {str(path)!r} is not JSON: {error}; remove the line") from error
            continue
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {str(path)!r} is not a row of a log but {line[:40]!r}; remove the line")
        rows.append(row)
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows yet")
    return rows


def draw(rows: list[Row], title: str) -> Figure:
    """A figure with the panels for which the rows have values."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'ncsr_fast[train]'") from error
    panels = [panel for panel in _PANELS if panel(None, rows)]
    if not panels:
        raise ValueError("the log has nothing to plot yet")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.6 * across, 3.3 * down + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a folder's name may contain $
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, panel in zip(grid, panels):
        panel(axes, rows)
        axes.set_xlabel("step of the stage")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


# Panels: each function draws to `axes`, unless they are None, and returns True if there is anything to draw.


def _loss(stage: str, key: str, validated: str, title: str, unit: str) -> Callable[[Axes | None, list[Row]], bool]:
    def panel(axes: Axes | None, rows: list[Row]) -> bool:
        trained = _series(rows, stage, key) or _series(rows, stage, "loss")
        return _draw(
            axes,
            title,
            unit,
            [
                ("training", trained, {"color": _OF_STAGE[stage], "lw": 1}),
                (f"on {_images(rows)} images", _validated(rows, stage, validated), {"color": "black", "ls": "--"}),
            ],
        )

    return panel


def _rate(axes: Axes | None, rows: list[Row]) -> bool:
    curves = [(stage, _series(rows, stage, "lr"), {"color": color}) for stage, color in _OF_STAGE.items()]
    return _draw(axes, "learning rate", "Adam's learning rate", curves, log=True)


def _norm(axes: Axes | None, rows: list[Row]) -> bool:
    curves = []
    for stage, color in _OF_STAGE.items():
        curves.append((stage, _series(rows, stage, "grad_norm"), {"color": color, "lw": 1}))
    found = _draw(axes, "gradient norm", "norm before clipping", curves, log=True)
    for stage, color in _OF_STAGE.items() if found and axes is not None else ():
        if steps := _skipped(rows, stage):
            low = [0.03] * len(steps)  # share of the axes' height, because a skipped step may have no norm
            style = {"transform": axes.get_xaxis_transform(), "color": color, "marker": "x", "ls": "", "clip_on": False}
            axes.plot(steps, low, label=f"{stage}: {len(steps)} skipped", **style)
    return found


def _quality(metric: str, title: str, unit: str) -> Callable[[Axes | None, list[Row]], bool]:
    def panel(axes: Axes | None, rows: list[Row]) -> bool:
        curves = [("encoder alone", _validated(rows, "encoder", metric), {"color": _GREY, "ls": ":"})]
        for temperature, color in zip(_temperatures(rows), _colours()):
            curves.append((f"temperature {temperature}", _validated(rows, "flow", f"{metric}@{temperature}"), {"color": color}))
        return _draw(axes, f"{title}, {_images(rows)} images", unit, curves)

    return panel


def _range(axes: Axes | None, rows: list[Row]) -> bool:
    curves = []
    for temperature, color in zip(_temperatures(rows), _colours()):
        for metric, what, line in (("saturated", "saturated", "-"), ("nonfinite", "not finite", ":")):
            points = [(step, 100 * share) for step, share in _validated(rows, "flow", f"{metric}@{temperature}")]
            curves.append((f"{what}, temperature {temperature}", points, {"color": color, "ls": line}))
    return _draw(axes, "samples out of range", "values of the samples, %", curves)


def _inverse(axes: Axes | None, rows: list[Row]) -> bool:
    curves = [
        ("round-trip error", _validated(rows, "flow", "round_trip"), {"color": _RED}),
        ("smallest scale of a step", _validated(rows, "flow", "smallest_scale"), {"color": _BLUE, "ls": "--"}),
    ]
    return _draw(axes, "invertibility", "largest error, and divisor", curves, log=True)


_PANELS = (
    _loss("encoder", "loss", "l1", "encoder: L1 loss", "mean |SR - HR|, images in [0, 1]"),
    _loss("flow", "nll", "nll", "flow: negative log-likelihood", "bits per HR pixel position"),
    _rate,
    _norm,
    _quality("psnr", "PSNR", "dB"),
    _quality("ssim", "SSIM", "SSIM"),
    _quality("lr_psnr", "LR-PSNR", "dB"),
    _range,
    _inverse,
)


def _draw(
    axes: Axes | None, title: str, unit: str, curves: Iterable[tuple[str, Points, dict[str, Any]]], log: bool = False
) -> bool:
    curves = [(label, points, style) for label, points, style in curves if points]
    for label, points, style in curves if axes is not None else ():
        marks = {"marker": "o", "ms": 3} if len(points) < _MARKED else {}
        axes.plot(*zip(*points), label=label, **marks, **style)
    if axes is not None:
        axes.set_title(title)
        axes.set_ylabel(unit)
        if log and any(value > 0 for _, points, _ in curves for _, value in points):
            axes.set_yscale("log")
    return bool(curves)


# Values of the log.


def _series(rows: list[Row], stage: str, key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if row.get("stage") == stage and _number(row.get(key))]


def _validated(rows: list[Row], stage: str, key: str) -> Points:
    found = [(row["step"], row["validation"].get(key)) for row in rows if row.get("stage") == stage and "validation" in row]
    return [(step, value) for step, value in found if _number(value)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _skipped(rows: list[Row], stage: str) -> list[int]:
    return [row["step"] for row in rows if row.get("stage") == stage and row.get("event") == "skipped"]


def _temperatures(rows: list[Row]) -> list[str]:
    keys = {key.split("@")[1] for row in rows for key in row.get("validation", {}) if "@" in key}
    return sorted(keys, key=float)


def _colours() -> Iterable[str]:
    while True:
        yield from _OF_TEMPERATURE


def _images(rows: list[Row]) -> str:
    """The kind of images that the model was validated on: "training" if there were no others."""
    return next((row["images"] for row in rows if "images" in row), "validation")
