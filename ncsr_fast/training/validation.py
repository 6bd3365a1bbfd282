"""Validation of a model in training: metrics of some images, samples, and the best weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ncsr_fast.data.degradation import load_degradation
from ncsr_fast.data.images import ImageError, to_float
from ncsr_fast.data.low_light import equalize
from ncsr_fast.data.perturb import degrade
from ncsr_fast.data.sources import Source, list_sources, read_source
from ncsr_fast.model import NCSR
from ncsr_fast.training.batch import network_input
from ncsr_fast.training.processes import Processes
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import Stage

_NAMED = 5  # problems that an error names
_SEED = 2**31  # seed of noise and latents in validation, different from those of training


Pairs = dict[int, tuple[Tensor, Tensor]]  # HR and LR, uint8, the latter as `ncsr_fast.training.batch.stacked` has it


class Validation:
    """Metrics of some images, which the processes share.

    Args:
        pairs: The images that this process looks at, by number: see `validation_pairs`.
    """

    def __init__(self, model: NCSR, run: Run, processes: Processes, pairs: Pairs) -> None:
        self.model, self.run, self.processes, self._pairs = model, run, processes, pairs

    @torch.no_grad()
    def __call__(self, stage: Stage, step: int, best: float | None) -> float | None:
        """Log the mean of every metric, and show samples of the first image; return the lower of `best` and the mean `nll`.

        A flow whose `nll` is lower than `best` is written to RUN/best. An image that cannot be validated, for example because
        it does not fit in memory, is reported in the log and skipped; then no model is written to RUN/best.
        """
        rows: dict[int, dict[str, float]] = {}
        problems: dict[int, str] = {}
        self.model.eval()
        for number, pair in self._pairs.items():
            try:
                rows[number] = self._look(stage, step, number, *pair)
            except Exception as error:  # noqa: BLE001 - nothing in a look at the model is worth the end of its training
                problems[number] = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.model.train()
        shares = self.processes.gathered((rows, problems))
        rows = dict(sorted(item for share, _ in shares for item in share.items()))
        problems = dict(sorted(item for _, share in shares for item in share.items()))
        for number, problem in problems.items():
            self._report_problem(stage.name, step, number, problem)
        # in the order of the images, so that sums do not depend on the number of processes
        columns = {key: [row[key] for row in rows.values() if key in row] for row in rows.values() for key in row}
        means = {key: sum(values) / len(values) for key, values in columns.items()}
        lowest = best if problems else lower(best, means)
        if lowest != best:
            self.run.save_model(self.model, "best", {"step": step, **means})
        if means:
            self._report(stage.name, step, means)  # last, because it marks this validation as done
        return lowest

    def _look(self, stage: Stage, step: int, number: int, hr: Tensor, lr: Tensor) -> dict[str, float]:
        device, shown = self.processes.device, lr[None, :3]
        hr, lr = to_float(hr)[None].to(device), network_input(lr[None].to(device))
        generator = torch.Generator(self.processes.device).manual_seed(_SEED + number)
        metrics, images = stage.validate(hr, lr, generator)
        if number == 0:
            metrics |= stage.examine(hr, lr, generator)
            tiles = [F.interpolate(to_float(shown).to(device), size=hr.shape[2:], mode="nearest")[0], *images, hr[0]]
            self.run.show(stage.name, step, torch.cat(tiles, dim=2))
        return metrics

    def _report(self, stage: str, step: int, means: dict[str, float]) -> None:
        images = "validation" if self.run.settings.validation else "training"
        self.run.log(stage, step, images=images, to_8bit=self.run.settings.to_8bit, validation=means)
        if self.processes.first:
            tqdm.write(f"{stage} {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in means.items()))
        if self.processes.first and any(value > 0 for key, value in means.items() if key.startswith("nonfinite")):
            tqdm.write("  some samples are not finite: the inverse explodes, which the likelihood does not show")

    def _report_problem(self, stage: str, step: int, number: int, problem: str) -> None:
        self.run.log(stage, step, event="validation failed", image=number, problem=problem)
        if self.processes.first:
            tqdm.write(
                f"{stage} {step}: validation image {number} is skipped ({problem}); training continues. If it does not fit "
                "in memory, choose a smaller validation_size"
            )


def lower(best: float | None, means: Mapping[str, float | None]) -> float | None:
    """The lower of `best` (None: none yet) and the `nll` of `means`, if `means` has a finite one."""
    nll = means.get("nll")
    if nll is None or not math.isfinite(nll):
        return best
    return nll if best is None else min(best, nll)


def validation_pairs(settings: TrainSettings, training: Sequence[tuple[Source, ...]], numbers: slice) -> Pairs:
    """The middle parts of the images to validate on, by number, from the validation folder or else the training images.

    Args:
        settings: The settings of the run.
        training: The training images; unreadable images are skipped, as in training.
        numbers: The numbers of the images to return; images are divided among the processes.

    Raises:
        ValueError: A file of the validation folder cannot be read, is too small, or does not fit its LR image.
        FileNotFoundError: There is no such folder.
    """
    if settings.validation is None:
        return _readable_pairs(settings, training, numbers)
    places = ([Path(place)] if place else [] for place in (settings.validation, settings.validation_lr))
    sources = list_sources(*places, ("validation", "validation_lr"))
    pairs, problems = {}, []
    for number in range(min(len(sources), settings.validation_images))[numbers]:
        try:
            pairs[number] = _pair(settings, sources[number], number)
        except (ImageError, OSError, MemoryError) as error:
            problems.append(str(error) or f"{str(sources[number][0])!r} does not fit in memory")
    if problems:
        named = "; ".join(problems[:_NAMED]) + ("; …" if len(problems) > _NAMED else "")
        raise ImageError(f"validation: {named}; remove or correct these files")
    return pairs


def _readable_pairs(settings: TrainSettings, training: Sequence[tuple[Source, ...]], numbers: slice) -> Pairs:
    pairs: Pairs = {}
    for files in training:
        with contextlib.suppress(ImageError, OSError, MemoryError):
            pairs[len(pairs)] = _pair(settings, files, len(pairs))
        if len(pairs) == settings.validation_images:
            break
    return {number: pairs[number] for number in range(len(pairs))[numbers]}


def _pair(settings: TrainSettings, files: tuple[Source, ...], number: int) -> tuple[Tensor, Tensor]:
    scale, unit = settings.model.scale, settings.crop_unit
    image, *given = (read_source(source) for source in files)
    height, width = image.shape[1:]
    if min(height, width) < unit:
        raise ImageError(f"{str(files[0])!r} is {height}×{width}, smaller than {unit}×{unit}")
    if given and tuple(given[0].shape[1:]) != (height // scale, width // scale):
        raise ImageError(
            f"{str(files[1])!r} is {given[0].shape[1]}×{given[0].shape[2]}, not 1/{scale} of its HR image's {height}×{width}"
        )
    hr, top, left = _middle(image, settings.validation_size, unit)
    if given:
        if settings.is_low_light:
            given[0] = torch.cat([given[0], equalize(given[0])])  # the histogram is the whole image's
        height, width = (side // scale for side in hr.shape[1:])
        lr = given[0][:, top // scale : top // scale + height, left // scale : left // scale + width]
        return hr, lr.clone()
    degradation = load_degradation(settings.degradation)
    if degradation is not None:
        return hr, degradation(hr, scale, torch.Generator().manual_seed(_SEED + number))
    return hr, degrade(hr, scale)


def _middle(image: Tensor, size: int, multiple: int) -> tuple[Tensor, int, int]:
    """The middle of (3, H, W) with sides of at most `size`, and its top and left; all are multiples of `multiple`."""
    sides = [min(side, size) // multiple * multiple for side in image.shape[1:]]
    starts = [(have - side) // 2 // multiple * multiple for have, side in zip(image.shape[1:], sides)]
    (top, left), (height, width) = starts, sides
    return image[:, top : top + height, left : left + width].clone(), top, left  # a view would hold the whole image in memory
