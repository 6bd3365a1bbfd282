"""The YAML of a table: which method stands in which row, checked before anything is measured."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ncsr_fast.evaluation.methods import BICUBIC
from ncsr_fast.evaluation.names import PROTOCOLS
from ncsr_fast.metrics.fidelity import check_to_8bit
from ncsr_fast.systems import TEMPERATURE

_COMMON = ("originals", "protocol", "scale", "n", "seed", "to_8bit")
_ROW = ("model", "samples", "report", "n", "temperature", "temperatures", "noise", "long_skip")
_SOURCES = ("model", "samples", "report")


@dataclass(frozen=True)
class RowSource:
    """Where the numbers of a row come from: a model, a folder of samples, or a report; None of them: nothing is configured."""

    model: str | None = None
    samples: str | None = None
    report: str | None = None
    n: int | None = None
    temperature: float = TEMPERATURE
    temperatures: tuple[float, ...] = ()  # that the plots also have
    noise: str | None = None
    long_skip: str | None = None

    @property
    def absent(self) -> str | None:
        """Why the row cannot be measured: nothing is configured, or it is not there; None where it can."""
        path = self.report or self.samples or self.model
        if path is None:
            return "no trained model"
        names_a_path = path != self.model or os.sep in path or path.endswith((".pth", ".pt", ".safetensors"))
        if path != BICUBIC and names_a_path and not Path(path).exists():
            return f"no trained model: {path!r} is not there" if path == self.model else f"{path!r} is not there"
        return None


@dataclass(frozen=True)
class TableConfiguration:
    """The data that a table is measured on, and its rows by name."""

    originals: str | None = None
    protocol: str = "ntire2021"
    scale: int | None = None
    n: int = 10
    seed: int = 0
    to_8bit: str = "truncate"
    rows: Mapping[str, RowSource] = field(default_factory=dict)
    printed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, RowSource]:
        """The rows that are not there yet and can be measured."""
        return {name: row for name, row in self.rows.items() if row.absent is None and row.report is None}


def read_configuration(file: str | os.PathLike, number: int) -> TableConfiguration:
    """The configuration of table `number` in a YAML; paths begin at the current folder.

    Its keys are originals, protocol, scale, n, seed and to_8bit, for all tables, and `tables`: by number, the same keys again
    for one table, `rows`, and `printed`, numbers of the paper that the package does not have. A row has one of model, samples
    and report, and n, temperature, temperatures, noise, long_skip.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: There is no PyYAML.
        ValueError: A key or value that is not as above; the message names it.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"--config needs PyYAML ({error}): pip install 'ncsr_fast[train]'") from error
    try:
        values = yaml.safe_load(Path(file).read_bytes()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{os.fspath(file)!r} is no YAML: {' '.join(str(error).split())}") from error
    try:
        return _configuration(values, number)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(file)!r}: a value is of another kind than it should be: {error}") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)!r}: {error}") from error


def _configuration(values: Mapping[str, Any], number: int) -> TableConfiguration:
    _check_keys(values, (*_COMMON, "tables"), "")
    tables = {str(key): table or {} for key, table in (values.get("tables") or {}).items()}
    _check_keys(tables, ("1", "2", "5", "6"), "tables: ")
    own = tables.get(str(number), {})
    _check_keys(own, (*_COMMON, "rows", "printed"), f"tables.{number}: ")
    common = {key: values[key] for key in _COMMON if key in values} | {key: own[key] for key in _COMMON if key in own}
    rows = {str(name): _row(str(name), row or {}) for name, row in (own.get("rows") or {}).items()}
    configuration = TableConfiguration(**common, rows=rows, printed=own.get("printed") or {})
    check_to_8bit(configuration.to_8bit)
    if configuration.protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {configuration.protocol!r}")
    if configuration.originals is None and any(row.model or row.samples for row in rows.values()):
        raise ValueError("originals must name the folder of HR images")
    return configuration


def _row(name: str, values: Mapping[str, Any]) -> RowSource:
    _check_keys(values, _ROW, f"row {name!r}: ")
    sources = [key for key in _SOURCES if values.get(key)]
    if len(sources) > 1:
        raise ValueError(f"row {name!r} has {' and '.join(sources)}: give one of the two")
    paths = {key: os.path.expanduser(values[key]) for key in sources}
    temperatures = tuple(float(value) for value in values.get("temperatures") or ())
    return RowSource(**{**values, **paths, "temperatures": temperatures})


def _check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in values:
        if str(key) not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; do you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            raise ValueError(f"{where}unknown key {str(key)!r}{hint}")
