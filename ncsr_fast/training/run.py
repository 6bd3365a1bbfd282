"""The folder of a training run: its settings, log and checkpoints."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ncsr_fast.files import CheckpointError, atomic_write
from ncsr_fast.training.settings import TrainSettings

_KEPT = 2  # checkpoints; the older one is there in case the newer one is damaged
# settings that may differ when a run is resumed: where the same files lie now, and what is reported when
_FREE = ("images", "lr_images", "validation", "log_every", "validate_every", "save_every", "validation_images", "temperatures")


class Run:
    """RUN/settings.json, RUN/log.jsonl, RUN/checkpoints/STAGE-STEP.pt, RUN/samples/*.png, RUN/encoder/, RUN/model/."""

    def __init__(self, folder: str | os.PathLike, settings: TrainSettings) -> None:
        """Create the folder, or open it to resume.

        raises  ValueError naming what differs when the folder holds a run with other settings
        """
        self.folder = Path(folder)
        self.settings = settings
        stored = self.folder / "settings.json"
        if stored.exists():
            before, now = json.loads(stored.read_text()), settings.to_dict()
            changed = [key for key in now if key not in _FREE and before.get(key) != now[key]]
            if changed:
                listed = ", ".join(f"{key} (was {before.get(key)!r}, now {now[key]!r})" for key in changed)
                raise ValueError(f"{str(self.folder)!r} holds a run with other settings: {listed}; choose another folder")
        with atomic_write(stored) as path:
            path.write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
        (self.folder / "checkpoints").mkdir(exist_ok=True)

    def log(self, **row: Any) -> None:
        """Append one JSON line to log.jsonl."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop the log lines of `stage` after `step`: a resumed run will do those steps, and log them, again."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # the last may be cut
        rows = [json.loads(line) for line in lines]
        kept = [line for line, row in zip(lines, rows) if row["stage"] != stage or row["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))

    def save(self, stage: str, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint atomically, then remove all but the last two of the stage."""
        state = {"stage": stage, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_write(self.folder / "checkpoints" / f"{stage}-{step:08d}.pt") as path:
            torch.save(state, path)
        for old in self._paths(stage)[:-_KEPT]:
            old.unlink()

    def started(self, stage: str) -> bool:
        """Whether there is any checkpoint of `stage`."""
        return bool(self._paths(stage))

    def latest(self, stage: str) -> dict[str, Any] | None:
        """The newest checkpoint of `stage` that can be read; a damaged one is reported and the one before it used.

        raises  CheckpointError when there are checkpoints and all are damaged
        """
        paths = self._paths(stage)
        for path in reversed(paths):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # noqa: BLE001 - a damaged zip or pickle raises almost anything
                warnings.warn(f"checkpoint {str(path)!r} is damaged and is not used: {error}", stacklevel=2)
        if paths:
            raise CheckpointError(f"no checkpoint of stage {stage!r} in {str(self.folder)!r} can be read")
        return None

    def _paths(self, stage: str) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob(f"{stage}-*.pt"))
