"""Configuration of a training run from a YAML file, a preset and overrides: its checked settings, and its folder."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncsr_fast.config import PRESETS, NCSRConfig
from ncsr_fast.systems import SYSTEMS
from ncsr_fast.training.published import RENAMED, from_published
from ncsr_fast.training.settings import PUBLISHED, TrainSettings

# the paper's variants: conditioned on the noise in the first two blocks, in all blocks, on its standard deviation, with noise
# but not conditioned on it, no noise
VARIANTS = ("noise", "noise-all", "std", "no-layer", "srflow")
_BESIDE = ("preset", "variant", "run")  # keys of a YAML file that are not fields of TrainSettings
_NOISE = ("noise_channels", "noise_steps")


@dataclass(frozen=True)
class Configuration:
    """A run: its settings, its folder (None if none is named), and a report of ignored keys of a published YAML file."""

    settings: TrainSettings
    run: str | None
    report: tuple[str, ...] = ()


def configure(path: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None) -> Configuration:
    """The run of a YAML file; precedence rises in the order defaults, preset, variant, YAML file, `overrides`.

    Args:
        path: A YAML file with the fields of TrainSettings, and `preset`, `variant` and `run`; its `model` has fields of
            NCSRConfig that override the preset's. Or a published YAML file, recognised by its network_G, instead of a preset.
        overrides: The same keys; texts are read as in a YAML file.

    Raises:
        ValueError: There are wrong values; the message has one line for each.
    """
    path = None if path is None else os.fspath(path)
    overrides, given = dict(overrides or {}), _read(path) if path is not None else {}
    problems = _Problems(path, overrides)
    report: list[str] = []
    name = None if path is None else Path(path).stem
    if "network_G" in given:
        base, report = _published(given, problems)
        name, given, architecture = str(given.get("name") or name), {}, base.pop("model")
        if "preset" in overrides:
            raise ValueError(
                f"preset: {problems.file} is a published YAML file, which has its own architecture; give one of the two"
            )
    else:
        preset = problems.choice("preset", overrides.get("preset", given.get("preset", "ncsr-x4")), tuple(PUBLISHED))
        base, architecture = PUBLISHED[preset], PRESETS[preset]
        if SYSTEMS[architecture.get("system", "ncsr")].noise:
            given.setdefault("variant", "noise" if architecture.get("noise_channels") else "srflow")
    fields = {field.name: field for field in dataclasses.fields(TrainSettings)}
    for source in (given, overrides):
        problems.unknown(source, (*fields, *_BESIDE))
    variant = overrides.get("variant", given.get("variant"))
    if variant is not None:
        variant = problems.choice("variant", variant, VARIANTS)
        system = SYSTEMS[architecture.get("system", "ncsr")]
        if not system.noise:
            problems.add("variant", f"is for NCSR: {system.title} has no noise-conditional layer")
            variant = None
    values = {key: value for key, value in {**base, **given, **overrides}.items() if key in fields}
    values["model"] = model = _model(architecture, variant, given.get("model"), overrides.get("model"), problems)
    if variant is not None and "max_std" not in {**given, **overrides}:
        if variant == "srflow":
            values["max_std"] = 0.0
        elif not base["max_std"]:  # SRFlow's value; a variant with noise needs the paper's
            values["max_std"] = PUBLISHED[f"ncsr-x{model.scale}"]["max_std"]
    settings = _validated(TrainSettings, values, problems)
    run = overrides.get("run", given.get("run", f"runs/{name}" if name else None))
    if run is not None and not (isinstance(run, str) and run):
        problems.add("run", f"should be a folder, not {run!r}")
    problems.raise_all()
    return Configuration(settings, None if run is None else os.path.expanduser(run), tuple(report))


class _Problems:
    """Messages about wrong values, raised together."""

    def __init__(self, file: str | None, overrides: Mapping[str, Any]) -> None:
        self.file, self.overrides, self.lines = file, overrides, []
        self.keys: Mapping[str, str] = {}  # the file's key of a field, if it is not the field's name

    def add(self, key: str, text: str, separator: str = ": ") -> None:
        field = key.partition("[")[0]
        if self.file is not None and field.partition(".")[0] not in self.overrides:
            key = f"{self.file}: {key.replace(field, self.keys.get(field, field), 1)}"
        self.lines.append(f"{key}{separator}{text}")

    def choice(self, key: str, value: Any, choices: tuple[str, ...]) -> str:
        """`value`, or after a problem the first choice, so that the other values can be checked too."""
        if value in choices:
            return value
        self.add(key, f"should be one of {', '.join(choices)}, not {value!r}")
        return choices[0]

    def unknown(self, values: Mapping[str, Any], known: tuple[str, ...], section: str = "") -> None:
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                self.add(f"{section}{key}", f"is not known; {hint}")

    def raise_all(self) -> None:
        if self.lines:
            raise ValueError("\n".join(self.lines))


def _read(path: str | os.PathLike) -> dict[str, Any]:
    yaml = _optional("yaml")
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)}: should be a YAML file, not a folder; folders of images go in `images`")
    try:
        values = yaml.safe_load(Path(path).read_bytes())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"{os.fspath(path)}: line {line}: {error.problem or 'not YAML'}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{os.fspath(path)}: not YAML: {error}".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(path)}: should hold `key: value` lines, not {type(values).__name__} {str(values)[:40]!r}")
    return values


def _published(options: Mapping[str, Any], problems: _Problems) -> tuple[dict[str, Any], list[str]]:
    problems.keys = RENAMED
    try:
        return from_published(options)
    except ValueError as error:
        raise ValueError(f"{problems.file}: {error}") from error


def _model(base: Mapping[str, Any], variant: str | None, given: Any, overrides: Any, problems: _Problems) -> NCSRConfig:
    """The architecture of `base` with a variant's noise and the given fields; after a problem, any architecture."""
    fields = {}
    for section in (given, overrides):
        if section is not None and not isinstance(section, Mapping):
            problems.add("model", f"should hold `key: value` lines of NCSRConfig's fields, not {section!r}")
            return NCSRConfig()
        fields.update(section or {})
    problems.unknown(fields, tuple(field.name for field in dataclasses.fields(NCSRConfig)), "model.")
    values = {**base, **fields}
    if variant is not None:
        # the noise steps of a variant depend on the final depth and scale of the model
        plain = {key: value for key, value in values.items() if key not in _NOISE}
        shape = _validated(NCSRConfig, plain, problems, "model")
        if shape is None:
            return NCSRConfig()
        values = {**plain, **_noise(variant, shape), **{key: fields[key] for key in _NOISE if key in fields}}
    return _validated(NCSRConfig, values, problems, "model") or NCSRConfig()


def _noise(variant: str, shape: NCSRConfig) -> dict[str, Any]:
    """The noise fields of NCSRConfig for a variant."""
    if variant == "srflow":
        return {"noise_channels": 0, "noise_steps": ()}
    depth = 16 if shape.scale == 8 else shape.steps  # ×8 has K = 20 steps, of which the last 16 have the noise coupling
    steps = {"noise-all": (shape.steps,) * shape.levels, "no-layer": (0,) * shape.levels}
    first_two = (0,) * (shape.levels - 2) + (
        depth,
        depth,
    )  # "first" in the order of sampling; levels are counted from the HR side
    return {"noise_channels": 1 if variant == "std" else 3, "noise_steps": steps.get(variant, first_two)}


def _validated(kind: type, values: Mapping[str, Any], problems: _Problems, section: str = "") -> Any:
    """The dataclass `kind` of these values, or None after adding their problems."""
    pydantic = _optional("pydantic")
    hints = typing.get_type_hints(kind)
    values = {key: _meant(value, hints[key]) for key, value in values.items() if key in hints}
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        for key, text, separator in _messages(error.errors(), section):
            problems.add(key, text, separator)
    return None


def _meant(value: Any, hint: Any) -> Any:
    """`value` as a YAML file or a command line means it, where pydantic alone would read it differently."""
    kinds = {hint, *typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return value if value is None else [_meant(item, typing.get_args(hint)[0]) for item in items]
    if isinstance(value, str) and types.NoneType in kinds and value.lower() in ("none", "null"):
        return None
    if kinds & {int, float} and isinstance(value, bool):
        return str(value).lower()  # so that `batch: yes` is not read as 1
    if int in kinds and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e5 as a text; pydantic accepts whole floats as integers
        except ValueError:
            return value
    return value


_EXPECTED = {
    "float_type": "a number", "float_parsing": "a number", "int_type": "an integer", "int_parsing": "an integer",
    "int_from_float": "an integer", "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "tuple_type": "a list",
}  # fmt: skip


def _messages(errors: list[dict[str, Any]], section: str) -> Iterator[tuple[str, str, str]]:
    """(key, text, separator) of each of pydantic's errors."""
    for error in errors:
        places = [section] * bool(section) + [str(part) for part in error["loc"] if isinstance(part, str)]
        key = ".".join(places) + "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
        if error["type"] == "value_error":  # from __post_init__, whose text begins with the field
            name, _, text = str(error["ctx"]["error"]).partition(" ")
            yield ".".join((*places, name)), text, " "
        elif error["type"] == "missing" and error["loc"] == (places[-1],):
            yield key, "is missing", " "
        elif error["type"] in ("missing", "too_long"):
            yield key, f"has the wrong number of values: {error['input']!r}", ": "
        elif error["type"] in _EXPECTED:
            yield key, f"should be {_EXPECTED[error['type']]}, not {error['input']!r}", ": "
        else:
            yield key, f"{error['msg']}, not {error['input']!r}", ": "


def _optional(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading the settings of a training run needs {name}: pip install 'ncsr_fast[train]'") from error
