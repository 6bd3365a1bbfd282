"""Looking at a model in training: metrics of some images, its samples, and which weights were best."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ncsr_fast.data.degradation import load_degradation
from ncsr_fast.data.images import to_float
from ncsr_fast.data.perturb import degrade
from ncsr_fast.data.sources import list_sources, read_source
from ncsr_fast.files import atomic_write
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.training.processes import Processes
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import Stage

_SEED = 2**31  # of the noise and latents of validation, apart from those of training


class Validation:
    """Metrics of some images, those of the validation folder, or training images without one: the middle of each.

    The processes share them. They are read at the first look, and kept.
    """

    def __init__(self, model: NCSR, run: Run, processes: Processes) -> None:
        self.model, self.run, self.processes = model, run, processes
        self._pairs: dict[int, tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def __call__(self, stage: Stage, step: int, best: float | None) -> float | None:
        """Log the mean of every metric, and show samples of the first image.

        A flow whose `nll` is lower than `best` goes to RUN/best, as a model. Returns the better of the two.
        """
        if self._pairs is None:
            numbers = slice(self.processes.rank, None, self.processes.world)
            self._pairs = validation_pairs(self.run.settings, numbers)
        self.model.eval()
        rows = {number: self._look(stage, step, number, *pair) for number, pair in self._pairs.items()}
        self.model.train()
        found = [item for share in self.processes.gathered(rows) for item in share.items()]
        rows = [row for _, row in sorted(found)]  # in the images' order: sums do not depend on the number of processes
        columns = {key: [row[key] for row in rows if key in row] for row in rows for key in row}
        means = {key: sum(values) / len(values) for key, values in columns.items()}
        self._report(stage.name, step, means)
        if "nll" not in means or not (best is None or means["nll"] < best):
            return best
        if self.processes.first:
            self.model.save_pretrained(self.run.folder / "best")
            with atomic_write(self.run.folder / "best" / "validation.json") as path:
                path.write_text(json.dumps({"step": step, **means}, indent=2) + "\n")
        return means["nll"]

    def _look(self, stage: Stage, step: int, number: int, hr: Tensor, lr: Tensor) -> dict[str, float]:
        hr, lr = (to_float(image)[None].to(self.processes.device) for image in (hr, lr))
        generator = torch.Generator(self.processes.device).manual_seed(_SEED + number)
        metrics, images = stage.validate(hr, lr, generator)
        if number == 0:
            metrics |= stage.examine(hr, lr, generator)
            tiles = [F.interpolate(lr, size=hr.shape[2:], mode="nearest")[0], *images, hr[0]]
            self.run.show(stage.name, step, torch.cat(tiles, dim=2))
        return metrics

    def _report(self, stage: str, step: int, means: dict[str, float]) -> None:
        images = "validation" if self.run.settings.validation else "training"
        self.run.log(stage, step, images=images, validation=means)
        if self.processes.first:
            tqdm.write(f"{stage} {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in means.items()))
        if self.processes.first and any(value > 0 for key, value in means.items() if key.startswith("nonfinite")):
            tqdm.write("  there are samples that are not finite: the inverse explodes, which the likelihood does not show")


def validation_pairs(settings: TrainSettings, numbers: slice) -> dict[int, tuple[Tensor, Tensor]]:
    """The uint8 pairs (3, H, W) of some of the images validated on, by number."""
    places = (settings.validation, settings.validation_lr)
    if settings.validation is None:
        places = (settings.images[0], settings.lr_images[0] if settings.lr_images else None)
    sources = list_sources(*([Path(place)] if place else [] for place in places))[: settings.validation_images]
    degradation = load_degradation(settings.degradation)
    scale, pairs = settings.model.scale, {}
    for number in range(len(sources))[numbers]:
        hr, *given = (read_source(source) for source in sources[number])
        hr, top, left = _middle(hr, settings.validation_size, 2 * scale)
        if given:
            height, width = (side // scale for side in hr.shape[1:])
            lr = given[0][:, top // scale : top // scale + height, left // scale : left // scale + width]
        elif degradation is not None:
            lr = degradation(hr, scale, torch.Generator().manual_seed(_SEED + number))
        else:
            lr = degrade(hr, scale)
        pairs[number] = hr, lr
    return pairs


def _middle(image: Tensor, size: int, multiple: int) -> tuple[Tensor, int, int]:
    """The middle of (3, H, W) with sides of at most `size`, multiples of `multiple`, and where it starts: such ones too."""
    sides = [min(side, size) // multiple * multiple for side in image.shape[1:]]
    starts = [(have - side) // 2 // multiple * multiple for have, side in zip(image.shape[1:], sides)]
    (top, left), (height, width) = starts, sides
    return image[:, top : top + height, left : left + width], top, left
