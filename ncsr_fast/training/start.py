"""Checks of everything that a run needs, before it starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ncsr_fast.data.crops import RandomCrops
from ncsr_fast.model import NCSR
from ncsr_fast.training.model import first_model, random_model
from ncsr_fast.training.processes import Processes
from ncsr_fast.training.record import changes, data_record, write_record
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.validation import Pairs, validation_pairs

T = TypeVar("T")
_STATE = 3  # values in a checkpoint per weight: the weight and Adam's two moments
_WORKERS = 8  # per processor
_MIB = 2**20


@dataclass
class Start:
    """State that a run begins or resumes with."""

    run: Run
    crops: RandomCrops
    pairs: Pairs  # images to validate on
    model: NCSR
    checkpoints: dict[str, dict[str, Any]]  # by stage: the newest checkpoint of the newest stage, if any
    data: dict[str, Any] | None  # record of the images; None in processes that write nothing
    changed: str | None  # differences from the images that the run began with

    def write(self, report: tuple[str, ...] = ()) -> None:
        """Write the first files of the run: see `Run.begin`."""
        self.run.begin(report)
        if self.data is not None:
            write_record(self.run.folder / "data.json", self.data)


@dataclass
class _Problems:
    """Errors that are raised together, so that a user can correct them together."""

    errors: list[Exception] = field(default_factory=list)

    def attempt(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """The value of `call`, or None after an error, which is recorded."""
        try:
            return call(*arguments)
        except (ValueError, OSError, ImportError) as error:
            self.errors.append(error)
            return None

    def raise_all(self) -> None:
        """Raise a recorded error; if there are several, raise a ValueError with a line for each."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ValueError("\n".join(map(str, self.errors)))


def prepared(settings: TrainSettings, folder: Path, processes: Processes) -> Start:
    """Everything that a run with these settings in `folder` needs, read and checked; nothing is written.

    Raises:
        ValueError, OSError, ImportError: The settings do not fit the folder, the images, the weights, the number of processes
            or the disk; several such errors are one ValueError with a line for each.
    """
    problems = _Problems()
    problems.attempt(_check_share, settings, processes)
    run = problems.attempt(Run, folder, settings, processes.first)
    crops = problems.attempt(_crops, settings)
    share = slice(processes.rank, None, processes.world)
    pairs = None
    if crops is not None or settings.validation is not None:
        pairs = problems.attempt(validation_pairs, settings, crops.files if crops else (), share)
    if crops is not None:
        problems.attempt(crops.__getitem__, 0)  # checks that the degradation works, and that not all files are broken
    stage = next((stage for stage in ("flow", "encoder") if run is not None and run.started(stage)), None)
    # a resumed run has its weights in a checkpoint, and no longer needs the initial weights
    model = problems.attempt(first_model if stage is None else random_model, settings)
    checkpoint = None
    if model is not None and stage is not None:
        checkpoint = problems.attempt(run.latest, stage, model)
    if model is not None and processes.first:
        problems.attempt(_check_room, folder, model)
    data = changed = None
    if crops is not None and processes.first:
        data = problems.attempt(data_record, crops)
    if data is not None:
        changed = problems.attempt(changes, folder / "data.json", data)
    problems.raise_all()
    return Start(run, crops, pairs, model, {} if checkpoint is None else {stage: checkpoint}, data, changed)


def _crops(settings: TrainSettings) -> RandomCrops:
    return RandomCrops(
        settings.images,
        settings.lr_images,
        scale=settings.model.scale,
        crop=settings.crop,
        seed=settings.seed,
        degradation=settings.degradation,
        equalize=settings.is_low_light,
    )


def _check_share(settings: TrainSettings, processes: Processes) -> None:
    if settings.batch % processes.world:
        raise ValueError(
            f"batch must be a multiple of the number of processes, {processes.world}, which share it, not {settings.batch}"
        )
    most = _WORKERS * (os.cpu_count() or 1)
    if settings.workers > most:
        raise ValueError(f"workers: {settings.workers} processes are too many for {os.cpu_count()} processors; at most {most}")
    if settings.graph and processes.device.type != "cuda":
        raise ValueError(f"graph: CUDA graphs need a GPU, but the device is {str(processes.device)!r}; leave graph out")


def _check_room(folder: Path, model: NCSR) -> None:
    needed = _STATE * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the disk of {str(folder)!r} has {free / _MIB:.0f} MiB free, but a checkpoint takes {needed / _MIB:.0f} MiB; "
            "make room, or choose another folder"
        )
