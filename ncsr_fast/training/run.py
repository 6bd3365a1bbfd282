"""The folder of a training run: its settings, log and checkpoints."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import write_image
from ncsr_fast.files import CheckpointError, atomic_write, check_finite, read_checkpoint
from ncsr_fast.training.board import Board
from ncsr_fast.training.settings import TrainSettings

# settings that may differ when a run is resumed: where the same files lie now, how they are read, what is reported when
_FREE = (
    "images", "lr_images", "validation", "validation_lr", "workers", "cache_gib", "graph", "max_skipped", "log_every",
    "validate_every", "save_every", "keep", "validation_images", "validation_size", "temperatures", "tensorboard",
)  # fmt: skip


class Run:
    """RUN/settings.json, log.jsonl, checkpoints/STAGE-STEP.pt, samples/*.png, best/, encoder/, model/, tensorboard/, cache/.

    Of the processes that train together, only the first (`writes`) writes any of it.
    """

    def __init__(self, folder: str | os.PathLike, settings: TrainSettings, writes: bool = True) -> None:
        """Create the folder, or open it to resume.

        raises  ValueError naming what differs when the folder holds a run with other settings
        """
        self.folder = Path(folder)
        self.settings, self.writes = settings, writes
        self.board = Board(self.folder / "tensorboard") if writes and settings.tensorboard else None
        stored = self.folder / "settings.json"
        if stored.exists():
            before, now = json.loads(stored.read_text()), settings.to_dict()
            changed = [key for key in now if key not in _FREE and before.get(key) != now[key]]
            if changed:
                listed = ", ".join(f"{key} (was {before.get(key)!r}, now {now[key]!r})" for key in changed)
                raise ValueError(f"{str(self.folder)!r} holds a run with other settings: {listed}; choose another folder")
        if writes:
            with atomic_write(stored) as path:
                path.write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            for left in (self.folder / "checkpoints").glob(".*"):  # by a process that was killed as it wrote
                left.unlink()

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append one JSON line to log.jsonl; numbers, those of a validation too, go to TensorBoard as well."""
        if not self.writes:
            return
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        if self.board is not None:
            validation = {f"validation/{key}": value for key, value in values.get("validation", {}).items()}
            self.board.scalars(step, stage, validation or {key: v for key, v in values.items() if isinstance(v, (int, float))})

    def show(self, stage: str, step: int, picture: Tensor) -> None:
        """Keep a picture (3, H, W) as samples/STAGE-STEP.png."""
        if not self.writes:
            return
        write_image(self.folder / "samples" / f"{stage}-{step:08d}.png", picture)
        if self.board is not None:
            self.board.image(step, stage, "samples", picture)

    def rewind(self, stage: str, step: int) -> None:
        """Drop the log lines of `stage` after `step`: a resumed run will do those steps, and log them, again."""
        path = self.folder / "log.jsonl"
        if not self.writes or not path.exists():
            return
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # the last may be cut
        rows = [json.loads(line) for line in lines]
        kept = [line for line, row in zip(lines, rows) if row["stage"] != stage or row["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically, then remove all but the last few of the stage."""
        if not self.writes:
            return
        with atomic_write(self.folder / "checkpoints" / f"{stage}-{step:08d}.pt") as path:
            torch.save({"stage": stage, "step": step, **state}, path)
        for old in self._paths(stage)[: -self.settings.keep]:
            old.unlink()

    def started(self, stage: str) -> bool:
        """Whether there is any checkpoint of `stage`."""
        return bool(self._paths(stage))

    def latest(self, stage: str) -> dict[str, Any] | None:
        """The newest checkpoint of `stage` that is whole; a damaged one is reported and the one before it used.

        raises  CheckpointError when there are checkpoints and all are damaged
        """
        paths = self._paths(stage)
        for path in reversed(paths):
            try:
                return _load(path)
            except Exception as error:  # noqa: BLE001 - a damaged zip or pickle raises almost anything
                warnings.warn(f"checkpoint {str(path)!r} is damaged and is not used: {error}", stacklevel=2)
        if paths:
            raise CheckpointError(
                f"no checkpoint of stage {stage!r} in {str(self.folder)!r} can be read; remove them to begin the stage anew"
            )
        return None

    def _paths(self, stage: str) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob(f"{stage}-*.pt"))


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint whose every byte is as it was written: torch.load alone does not look at the checksums in the file."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"the checksum of {damaged} is wrong")
    checkpoint = read_checkpoint(path)
    check_finite(checkpoint["model"], "its model")
    return checkpoint
