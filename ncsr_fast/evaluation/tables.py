"""Tables 1, 2, 5 and 6 of the NCSR paper (Kim & Son 2021): measured beside printed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ncsr_fast.evaluation.configuration import RowSource, TableConfiguration
from ncsr_fast.evaluation.methods import Folder, Method, load_method
from ncsr_fast.evaluation.names import PROTOCOLS, Originals, find_originals, find_samples
from ncsr_fast.evaluation.protocol import evaluate_method
from ncsr_fast.evaluation.reports import METRICS, Report, read_report, write_csv
from ncsr_fast.files import atomic_write

COLUMNS = ("lpips", "diversity", "lr_psnr", "lr_psnr_worst", "psnr", "ssim")
_DIGITS = {"lpips": 3, "ssim": 3}  # of the paper; others have 2
_SCALE = 4  # of files, which do not say it


@dataclass
class Row:
    """A row: what the paper prints, and the report at the row's temperature, or why there is none."""

    name: str
    printed: Mapping[str, float]
    report: Report | None = None
    absent: str | None = None
    sweep: dict[float, Report] = field(default_factory=dict)  # by temperature, for the plots


@dataclass(frozen=True)
class Table:
    """A table of the paper, with what was measured."""

    number: int
    title: str
    source: str | None  # of the printed numbers; None where the package has none
    rows: list[Row]
    notes: list[str]

    def markdown(self) -> str:
        """The table as Markdown: each metric measured, with its 95 % interval, and printed."""
        keys = self.columns
        headers = [f"{METRICS[key][0]} {kind}" for key in keys for kind in ("measured", "printed")]
        lines = [
            f"**Table {self.number}.** {self.title}",
            "",
            f"| model | {' | '.join(headers)} |",
            f"| --- |{' --- |' * len(headers)}",
        ]
        lines += [f"| {row.name} | {' | '.join(self._cells(row, keys))} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"

    @property
    def columns(self) -> list[str]:
        """Metrics that a row has, measured or printed."""
        measured = {key for row in self.rows if row.report for key, mean in row.report.means().items() if mean is not None}
        printed = {key for row in self.rows for key in row.printed}
        return [key for key in COLUMNS if key in measured | printed or key in COLUMNS[:3]]

    def write_csv(self, file: str | os.PathLike) -> None:
        """Write a line for each row: name, every metric measured, its interval and printed, and why there is none."""
        write_csv(file, [dict(_csv_cells(row, self.columns)) for row in self.rows])

    def write(self, folder: Path) -> list[Path]:
        """Write table{number}.md and .csv to a folder; return their paths."""
        markdown, lines = folder / f"table{self.number}.md", folder / f"table{self.number}.csv"
        with atomic_write(markdown) as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")
        self.write_csv(lines)
        return [markdown, lines]

    def _cells(self, row: Row, keys: list[str]) -> Iterator[str]:
        means, intervals = (row.report.means(), row.report.intervals()) if row.report else ({}, {})
        for place, key in enumerate(keys):
            digits = _DIGITS.get(key, 2)
            mean, interval = means.get(key), intervals.get(key)
            spread = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval else ""
            reason = (row.absent or "") if place == 0 else ""
            yield (reason or "–") if mean is None else f"{mean:.{digits}f}{spread}"
            yield f"{row.printed[key]:.{digits}f}" if key in row.printed else "–"


def _csv_cells(row: Row, keys: list[str]) -> Iterator[tuple[str, Any]]:
    means, intervals = (row.report.means(), row.report.intervals()) if row.report else ({}, {})
    yield "model", row.name
    for key in keys:
        interval = intervals.get(key)
        yield f"{key}_measured", means.get(key)
        yield f"{key}_low", interval.low if interval else None
        yield f"{key}_high", interval.high if interval else None
        yield f"{key}_printed", row.printed.get(key)
    yield "to_8bit", row.report.to_8bit if row.report else None
    yield "images", len(row.report.names) if row.report else None
    yield "absent", row.absent


def printed_numbers() -> dict[str, Any]:
    """The paper's numbers, as far as the package has them, and the challenge's teams by scale, to plot against."""
    return json.loads((Path(__file__).parent / "printed.json").read_text(encoding="utf-8"))


def make_table(
    number: int,
    configuration: TableConfiguration,
    *,
    network: Any = None,
    device: str = "cpu",
    reports: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Table, list[str]]:
    """Measure or collect the rows of a table.

    Args:
        number: 1, 2, 5 or 6.
        configuration: From `read_configuration`.
        network: From `metrics.lpips_model`, on `device`.
        device: That samples and measures.
        reports: Folder that each report is written to as soon as it is made; None for nowhere.
        progress: Is told of each row and image.

    Returns:
        The table, and a line for each image that could not be measured.

    Raises:
        OSError, ValueError: Originals, samples, reports or models that are wrong; files are checked before any is measured.
    """
    known = printed_numbers()["tables"][str(number)]
    printed = {**known["rows"], **configuration.printed}
    sources = {**{name: RowSource() for name in printed}, **configuration.rows}
    rows = {name: Row(name, printed.get(name, {}), absent=source.absent) for name, source in sources.items()}
    for name, source in sources.items():
        if source.report is not None and source.absent is None:
            rows[name].report = read_report(source.report)
    measured = configuration.measured
    scale = configuration.scale or known["scale"]
    originals = find_originals(configuration.originals, PROTOCOLS[configuration.protocol]) if measured else None
    folders = {name: _folder(source, originals, configuration, scale) for name, source in measured.items() if source.samples}
    problems: list[str] = []
    for name, source in measured.items():
        for temperature in _temperatures(source):
            label = f"{name}@{temperature:g}" if source.temperatures else name
            progress(label)
            if source.samples:
                method, own = folders[name], scale or _SCALE
            else:
                method, own = _model(source, configuration, scale, temperature, device)
            report, wrong = evaluate_method(method, originals, own, network=network, device=device, progress=progress)
            problems += [f"{label}: {problem}" for problem in wrong]
            if temperature == source.temperature:
                rows[name].report = report
            rows[name].sweep[temperature] = report
            if reports is not None:
                report.write_json(reports / f"table{number}-{_file_name(label)}.json")
    found = list(rows.values())
    return Table(number, known["title"], known["source"], found, _notes(number, known, configuration, found)), problems


def _temperatures(source: RowSource) -> list[float]:
    if source.samples is not None:
        return [source.temperature]
    return sorted({*source.temperatures, source.temperature})


def _folder(source: RowSource, originals: Originals, configuration: TableConfiguration, scale: int | None) -> Folder:
    return Folder(source.samples, find_samples(source.samples, originals, source.n or configuration.n, scale or _SCALE))


def _model(
    source: RowSource, configuration: TableConfiguration, scale: int | None, temperature: float, device: str
) -> tuple[Method, int]:
    return load_method(
        source.model,
        scale,
        n=source.n or configuration.n,
        temperature=temperature,
        seed=configuration.seed,
        to_8bit=configuration.to_8bit,
        long_skip=source.long_skip,
        noise=source.noise,
        device=device,
    )


def _notes(number: int, known: Mapping[str, Any], configuration: TableConfiguration, rows: list[Row]) -> list[str]:
    notes = []
    if known["source"]:
        notes.append(f"Printed: {known['source']}.")
    elif configuration.printed:
        notes.append("Printed: as the configuration has it.")
    else:
        notes.append(f"The package has no printed numbers of table {number}: give them as `printed` in the configuration.")
    reports = [row.report for row in rows if row.report]
    for bits in dict.fromkeys(report.to_8bit for report in reports):
        names = ", ".join(row.name for row in rows if row.report and row.report.to_8bit == bits)
        notes.append(f"8 bits by {bits}: {names}." if bits else f"8 bits as the files are: {names}.")
    notes += [f"{note}." for note in dict.fromkeys(note for report in reports for note in report.notes)]
    return notes


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_.@" else f"%{ord(letter):02x}" for letter in name)
