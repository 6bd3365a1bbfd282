"""The folder of a training run: its settings, log and checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.config import NCSRConfig
from ncsr_fast.data.images import write_image
from ncsr_fast.files import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    atomic_write,
    check_weights,
    differences,
    json_value,
    listed,
    read_checkpoint,
    read_json,
)
from ncsr_fast.training.board import Board
from ncsr_fast.training.settings import DEFAULTS, TrainSettings

# settings that may differ when a run is resumed: where the same files lie now, how they are read, what is reported when
_FREE = (
    "images", "lr_images", "validation", "validation_lr", "workers", "cache_gib", "graph", "max_skipped", "log_every",
    "validate_every", "save_every", "keep", "validation_images", "validation_size", "temperatures", "to_8bit", "tensorboard",
)  # fmt: skip
_FILES = ("settings.json", "data.json", "log.jsonl", "lock", "published_options.txt")
_FOLDERS = ("checkpoints", "samples", "best", "encoder", "model", "tensorboard", "cache")
_CHECKPOINT = {"stage", "step", "model", "optimizer", "counters", "rate", "best"}  # keys of a checkpoint
_MIB = 2**20


class Run:
    """The folder of a run.

    It contains the `_FOLDERS`, settings.json, data.json (the record of the images), log.jsonl, checkpoints/STAGE-STEP.pt,
    samples/*.png, the file lock while a process trains, and published_options.txt if a published YAML file has the settings.

    Of the processes that train together, only the first (`writes`) writes to the folder. Nothing is written before `begin`.
    """

    def __init__(self, folder: str | os.PathLike, settings: TrainSettings, writes: bool = True) -> None:
        """Check the folder that a run begins or is resumed in.

        Raises:
            ValueError: The folder contains a run with other settings, or a run of which a part is missing or damaged.
            OSError: The folder cannot be written to.
            ImportError: The settings ask for TensorBoard, which is not installed.
        """
        self.folder = Path(folder)
        self.settings, self.writes = settings, writes
        self.board = Board(self.folder / "tensorboard") if writes and settings.tensorboard else None
        self._refuse_other_settings()
        if writes:
            self._check_writable()

    def begin(self, report: Sequence[str] = ()) -> None:
        """Write the settings, and the report of a published YAML file's keys that are not followed."""
        if not self.writes:
            return
        with self._writing("settings.json") as path, atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.settings.to_dict(), indent=2) + "\n", encoding="utf-8")
        if report:
            with self._writing("published_options.txt") as path, atomic_write(path) as temporary:
                temporary.write_text("\n".join(report) + "\n", encoding="utf-8")
        with self._writing("checkpoints") as path:
            path.mkdir(exist_ok=True)
        for left in (self.folder / "checkpoints").iterdir():
            if re.fullmatch(r"\.\w+-\d{8,}\.pt\.\w+\.pt", left.name):  # left by a process that was killed while it wrote
                left.unlink(missing_ok=True)

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append one JSON line to log.jsonl, with null for numbers that are not finite; write numbers to TensorBoard too."""
        if not self.writes:
            return
        with self._writing("log.jsonl") as path, open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(json_value({"stage": stage, "step": step, **values}), allow_nan=False) + "\n")
        if self.board is not None:
            validation = {f"validation/{key}": value for key, value in values.get("validation", {}).items()}
            self.board.scalars(step, stage, validation or {key: v for key, v in values.items() if isinstance(v, (int, float))})

    def show(self, stage: str, step: int, picture: Tensor) -> None:
        """Write a picture (3, H, W) to samples/STAGE-STEP.png."""
        if not self.writes:
            return
        with self._writing(f"samples/{stage}-{step:08d}.png") as path:
            write_image(path, picture)
        if self.board is not None:
            self.board.image(step, stage, "samples", picture)

    def rewind(self, stage: str, step: int) -> None:
        """Remove the log lines of `stage` after `step`: a resumed run repeats these steps and their log."""
        if not self.writes or not (self.folder / "log.jsonl").exists():
            return
        kept = [line for line, row in self._logged() if row["stage"] != stage or row["step"] <= step]
        with self._writing("log.jsonl") as path, atomic_write(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def validated(self, stage: str, step: int) -> dict[str, float] | None:
        """The metrics logged by the validation after `step`; None without a validation."""
        if not (self.folder / "log.jsonl").exists():
            return None
        rows = [row for _, row in self._logged() if row["stage"] == stage and row["step"] == step and "validation" in row]
        return rows[-1]["validation"] if rows else None

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically, then remove all but the last few checkpoints of the stage."""
        if not self.writes:
            return
        with self._writing(f"checkpoints/{stage}-{step:08d}.pt") as path, atomic_write(path) as temporary:
            torch.save({"stage": stage, "step": step, **state}, temporary)
        for old in self._paths(stage)[: -self.settings.keep]:
            old.unlink(missing_ok=True)

    def save_model(self, model: nn.Module, name: str, metrics: Mapping[str, float] | None = None) -> None:
        """Write a model, and its metrics if given, to the subfolder `name`."""
        if not self.writes:
            return
        with self._writing(name) as path:
            model.save_pretrained(path)
            if metrics is not None:
                with atomic_write(path / "validation.json") as temporary:
                    temporary.write_text(json.dumps(json_value(metrics), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def started(self, stage: str) -> bool:
        """True if there is any checkpoint of `stage`."""
        return bool(self._paths(stage))

    def latest(self, stage: str, model: nn.Module) -> dict[str, Any] | None:
        """The newest intact checkpoint of `stage`; a damaged checkpoint is reported, and the checkpoint before it used.

        Raises:
            CheckpointError: All checkpoints are damaged, or the newest is of another model than `model`.
        """
        paths = self._paths(stage)
        for path in reversed(paths):
            try:
                checkpoint = _load(path)
            except Exception as error:  # noqa: BLE001 - a damaged zip or pickle raises almost anything
                warnings.warn(f"checkpoint {str(path)!r} is damaged and is not used: {error}", stacklevel=2)
                continue
            _check(checkpoint, model, path)
            return checkpoint
        if paths:
            raise CheckpointError(
                f"no checkpoint of stage {stage!r} in {str(self.folder)!r} can be read; remove them to begin the stage again"
            )
        return None

    def continued(self) -> str:
        """Advice how a new run can start from the weights of this run."""
        found = next((name for name in ("model", "best") if (self.folder / name / "config.json").is_file()), None)
        if found is None:
            return "choose another folder"
        return f"choose another folder; with --start-from {self.folder / found} the new run starts from the weights of this run"

    def _refuse_other_settings(self) -> None:
        before = stored_settings(self.folder)
        if before is None:
            return
        now = self.settings.to_dict()
        before = {**DEFAULTS, **before}  # settings that came after the run began
        with contextlib.suppress(KeyError, TypeError, ValueError):  # fields that came later have their defaults
            before["model"] = NCSRConfig.from_dict(before["model"]).to_dict()
        changed = [key for key in now if key not in _FREE and before.get(key) != now[key]]
        if changed:
            differing = ", ".join(f"{key} (was {before.get(key)!r}, now {now[key]!r})" for key in changed)
            raise ValueError(f"{str(self.folder)!r} contains a run with other settings: {differing}; {self.continued()}")

    def _check_writable(self) -> None:
        for path in (self.folder / name for name in ("settings.json", "log.jsonl", *_FOLDERS)):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(f"{str(path)!r} cannot be written to; change its permissions, or choose another folder")

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """A context with the path of a file in the folder; an error in writing the file says how to resume the run."""
        path = self.folder / name
        try:
            yield path
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
            free = (
                f", {shutil.disk_usage(self.folder).free / _MIB:.0f} MiB are free on the disk" if self.folder.exists() else ""
            )
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise OSError(
                f"{str(path)!r} could not be written ({reason}{free}); once it can, the same command resumes the run "
                "from its last checkpoint"
            ) from error

    def _logged(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The lines of the log and their values, without a truncated last line, and without damaged lines, after a warning."""
        path = self.folder / "log.jsonl"
        for number, line in enumerate(path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True), start=1):
            try:
                row = json.loads(line) if line.endswith("\n") else None
                if row is not None:
                    yield line, {"stage": row["stage"], "step": row["step"], **row}
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"line {number} of {str(path)!r} is damaged and is ignored", stacklevel=3)

    def _paths(self, stage: str) -> list[Path]:
        return _checkpoints(self.folder, stage)


def written_files(folder: Path) -> list[Path]:
    """The files with fixed names that a run writes to its folder."""
    models = [folder / model / name for model in ("best", "encoder", "model") for name in (CONFIG, WEIGHTS)]
    return [*(folder / name for name in _FILES), *models]


def stored_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder; None if there is no run.

    Raises:
        ValueError: There are checkpoints but no settings, or the settings are damaged or not a run's.
    """
    stored = folder / "settings.json"
    if not stored.exists():
        found = [str(path) for stage in ("encoder", "flow") for path in _checkpoints(folder, stage)]
        if found:
            raise ValueError(
                f"{str(folder)!r} contains checkpoints ({found[-1]!r}) but no settings.json: the run's folder was not copied "
                "completely; copy it again, or choose another folder"
            )
        return None
    try:
        settings = read_json(stored)
    except ValueError as error:
        raise ValueError(
            f"{str(stored)!r} is damaged ({error}); copy it again from the original folder, or choose another folder"
        ) from error
    if not {"model", "images", "seed"} <= set(settings):
        raise ValueError(f"{str(stored)!r} does not contain settings of a training run; choose another folder")
    return settings


def _checkpoints(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage, the oldest first."""
    paths = (folder / "checkpoints").glob(f"{stage}-*.pt")
    return sorted(path for path in paths if re.fullmatch(rf"{stage}-\d{{8,}}\.pt", path.name))


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint after a test of the checksums in the file, which torch.load ignores."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"the checksum of {damaged} is wrong")
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, dict) and "model" in checkpoint:  # otherwise `_check` describes the problem
        check_weights(checkpoint["model"], "its model")
    return checkpoint


def _check(checkpoint: Any, model: nn.Module, path: Path) -> None:
    missing = _CHECKPOINT - set(checkpoint if isinstance(checkpoint, dict) else ())
    problems = {} if missing else differences({key: t.shape for key, t in model.state_dict().items()}, checkpoint["model"])
    if missing or problems:
        what = f"it has no {', '.join(sorted(missing))}" if missing else listed(problems)
        raise CheckpointError(
            f"checkpoint {str(path)!r} is not of a run with these settings: {what}; copy the run's folder again, or choose "
            "another"
        )
