"""Reports of an evaluation: JSON with means and intervals, CSV with a line for each image, and a table to read."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ncsr_fast import __version__
from ncsr_fast.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Interval, mean_interval
from ncsr_fast.files import atomic_write, json_value, read_json

METRICS = {  # what they are called in tables, digits, and whether more is better
    "lpips": ("LPIPS", 4, False),
    "lr_psnr": ("LR-PSNR dB", 4, True),
    "lr_psnr_worst": ("worst", 4, True),
    "diversity": ("diversity %", 4, True),
    "psnr": ("PSNR dB", 4, True),
    "ssim": ("SSIM", 4, True),
    "nll": ("NLL bits/position", 4, False),
    "bits_per_dim": ("bits/dim", 4, False),
}
_REQUIRED = ("protocol", "scale", "n", "method", "images")


@dataclass(frozen=True)
class Report:
    """The measurements of a method by a protocol.

    Attributes:
        protocol: Its name.
        scale: Of the super-resolution.
        n: Samples of each image.
        to_8bit: How samples became 8 bits: "round", "truncate", or None where that is not known.
        method: What the method is.
        lpips: SHA-256 of the weights of the LPIPS network, None without.
        notes: Differences from the challenge.
        names: Of the images.
        rows: Values of each image, by `METRICS`.
        curves: Scores of the first 1 … n samples of each image, by name; None where the protocol has none.
    """

    protocol: str
    scale: int
    n: int
    to_8bit: str | None
    method: dict[str, Any]
    lpips: str | None
    notes: list[str]
    names: list[str]
    rows: list[dict[str, float | None]]
    curves: list[dict[str, list[float]]] | None = None
    versions: dict[str, str] = field(default_factory=lambda: {"ncsr_fast": __version__, "torch": str(torch.__version__)})

    def column(self, metric: str) -> list[float] | None:
        """A metric of every image; None where it was not measured."""
        values = [row.get(metric) for row in self.rows]
        return None if any(value is None for value in values) else values

    @property
    def metrics(self) -> list[str]:
        """Names of the values of images, in the order of tables."""
        return [name for name in METRICS if any(name in row for row in self.rows)]

    def means(self) -> dict[str, float | None]:
        """Mean of each metric over the images, None where it was not measured."""
        return {name: None if (column := self.column(name)) is None else _mean(column) for name in self.metrics}

    def intervals(self) -> dict[str, Interval | None]:
        """Bootstrap interval of each mean."""
        return {name: None if (column := self.column(name)) is None else mean_interval(column) for name in self.metrics}

    def mean_curves(self) -> dict[str, list[float]]:
        """Curves, their means over images."""
        curves = self.curves or []
        return {
            name: [_mean(list(values)) for values in zip(*(curve[name] for curve in curves))] for name in (curves or [{}])[0]
        }

    def to_dict(self) -> dict[str, Any]:
        """The report in the names of its JSON."""
        images = [{"name": name, **row} for name, row in zip(self.names, self.rows)]
        for image, curves in zip(images, self.curves or []):
            image["curves"] = curves
        intervals = {name: None if interval is None else list(interval) for name, interval in self.intervals().items()}
        return {
            "protocol": self.protocol,
            "scale": self.scale,
            "n": self.n,
            "to_8bit": self.to_8bit,
            "method": self.method,
            "lpips_weights": self.lpips,
            "notes": self.notes,
            "means": self.means(),
            "intervals": intervals,
            "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
            **({"curves": self.mean_curves()} if self.curves else {}),
            "images": images,
            "versions": self.versions,
        }

    def write_json(self, file: str | os.PathLike) -> None:
        """Write the report; values that are not finite are null. Raises OSError."""
        text = json.dumps(json_value(self.to_dict()), indent=1, allow_nan=False, ensure_ascii=False)
        with atomic_write(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def write_csv(self, file: str | os.PathLike) -> None:
        """Write a line for each image: its name, metrics, and curves as name_n1 … name_nN. Raises OSError."""
        curves = self.curves or [{} for _ in self.rows]
        rows = [
            {
                "name": name,
                **row,
                **{f"{key}_n{n}": value for key, values in curve.items() for n, value in enumerate(values, 1)},
            }
            for name, row, curve in zip(self.names, self.rows, curves)
        ]
        write_csv(file, rows)

    def table(self) -> str:
        """Means with their intervals, one metric a line, and the notes."""
        intervals = self.intervals()
        bits = self.to_8bit or "as the files are"
        lines = [f"{self.protocol}, ×{self.scale}, {len(self.rows)} images, {self.n} samples each, 8 bits: {bits}"]
        for name, mean in self.means().items():
            label, digits, _ = METRICS[name]
            interval = intervals[name]
            spread = f"  [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval else ""
            lines.append(f"{label:18}" + ("not measured" if mean is None else f"{mean:10.{digits}f}{spread}"))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def write_csv(file: str | os.PathLike, rows: list[dict[str, Any]]) -> None:
    """Write rows under the names of the first, atomically. Raises OSError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(file) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_report(file: str | os.PathLike) -> Report:
    """A report that `Report.write_json` wrote; a PSNR that is null is infinite.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such report; the message names it.
    """
    try:
        values = read_json(file)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}: it is no report of `ncsr-fast evaluate --protocol`")
        images = values["images"]
        rows = [{name: image[name] for name in METRICS if name in image} for image in images]
        curves = [image["curves"] for image in images] if images and "curves" in images[0] else None
        return Report(
            protocol=values["protocol"],
            scale=values["scale"],
            n=values["n"],
            to_8bit=values.get("to_8bit"),
            method=values["method"],
            lpips=values.get("lpips_weights"),
            notes=values.get("notes", []),
            names=[image["name"] for image in images],
            rows=[_infinite(row) for row in rows],
            curves=curves,
            versions=values.get("versions", {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(file)!r} cannot be read as a report: {error}") from error


def _infinite(row: dict[str, float | None]) -> dict[str, float | None]:
    """The values of an image, whose PSNRs JSON has no word for where they are infinite: those of equal images."""
    return {name: math.inf if value is None and "psnr" in name else value for name, value in row.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)
