"""Looking at a model in training: metrics of some images, its samples, and which weights were best."""

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

_NAMED = 5  # problems an error spells out
_SEED = 2**31  # of the noise and latents of validation, apart from those of training


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

        A flow whose `nll` is lower than `best` goes to RUN/best, as a model. An image that cannot be looked at (memory that
        does not suffice, say) is reported in the log and passed over; then no model goes to RUN/best.
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
        # in the images' order: sums do not depend on the number of processes
        columns = {key: [row[key] for row in rows.values() if key in row] for row in rows.values() for key in row}
        means = {key: sum(values) / len(values) for key, values in columns.items()}
        lowest = best if problems else lower(best, means)
        if lowest != best:
            self.run.save_model(self.model, "best", {"step": step, **means})
        if means:
            self._report(stage.name, step, means)  # after the rest: it says that this validation need not be done again
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
            tqdm.write("  there are samples that are not finite: the inverse explodes, which the likelihood does not show")

    def _report_problem(self, stage: str, step: int, number: int, problem: str) -> None:
        self.run.log(stage, step, event="validation failed", image=number, problem=problem)
        if self.processes.first:
            tqdm.write(
                f"{stage} {step}: validation image {number} is passed over ({problem}); training goes on. Where memory does "
                "not suffice, a smaller validation_size helps"
            )


def lower(best: float | None, means: Mapping[str, float | None]) -> float | None:
    """The lower of `best` (None: nothing yet) and the `nll` of `means`, where there is one that is finite."""
    nll = means.get("nll")
    if nll is None or not math.isfinite(nll):
        return best
    return nll if best is None else min(best, nll)


def validation_pairs(settings: TrainSettings, training: Sequence[tuple[Source, ...]], numbers: slice) -> Pairs:
    """The middles of the images validated on, by number: of the validation folder, or without one of training images.

    Args:
        settings: Of the run.
        training: The training images; those that cannot be read are passed over, as in training.
        numbers: The part of the images to return; the processes share them.

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
            problems.append(str(error) or f"{str(sources[number][0])!r} is too large for the memory there is")
    if problems:
        named = "; ".join(problems[:_NAMED]) + ("; …" if len(problems) > _NAMED else "")
        raise ImageError(f"validation: {named}; remove or mend what is not right")
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
        raise ImageError(f"{str(files[0])!r} is {height}×{width}, smaller than the {unit}×{unit} that are looked at")
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
    """The middle of (3, H, W), its sides at most `size`, and its top and left: all of them multiples of `multiple`."""
    sides = [min(side, size) // multiple * multiple for side in image.shape[1:]]
    starts = [(have - side) // 2 // multiple * multiple for have, side in zip(image.shape[1:], sides)]
    (top, left), (height, width) = starts, sides
    return image[:, top : top + height, left : left + width].clone(), top, left  # a view would keep the whole image
