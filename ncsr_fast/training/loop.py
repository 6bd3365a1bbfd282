"""The training loop of a stage, and the run of both stages."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ncsr_fast.data.crops import RandomCrops, crop_loader
from ncsr_fast.data.images import crop_to_multiple, list_images, read_image, to_float, write_image
from ncsr_fast.data.perturb import degrade, to_pair
from ncsr_fast.nn.encoder import RRDB
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import EncoderStage, FlowStage, Stage

# Distinct streams of random numbers of one seed: noise of step n, and of validation.
_NOISE_SEEDS, _VALIDATION_SEED = 2**32, 2**31
_VALIDATED = 512  # largest side of an image validated on: a whole DIV2K image takes a CPU minutes


class TrainingDiverged(ArithmeticError):
    """The loss or the gradient is no longer finite."""


def train(settings: TrainSettings, folder: str | os.PathLike, device: str = "cpu", workers: int = 0) -> NCSR:
    """Train a model from nothing to `folder`/model, or go on where a run in `folder` was stopped.

    A run that is stopped at any moment and started again ends with the same weights, bit for bit, as one that
    was not (on a GPU as far as PyTorch's kernels there are deterministic): the batches, the noise and the learning
    rate of a step depend on the seed and its number alone.

    raises  ValueError for a folder with a run of other settings or without a usable image, TrainingDiverged
            when a loss or gradient is not finite (the last checkpoint is kept)
    """
    run = Run(folder, settings)
    crops = RandomCrops(
        settings.images, settings.lr_images, scale=settings.config.scale, crop=settings.crop, seed=settings.seed
    )
    torch.manual_seed(settings.seed)
    model = NCSR(settings.config)
    if settings.start_from is not None:
        model.load_published(NCSR.from_pretrained(settings.start_from).published_state_dict())
    if settings.encoder_weights is not None:
        model.encoder.load_published(RRDB.from_pretrained(settings.encoder_weights).published_state_dict())
    model.to(device).train()
    if settings.encoder_steps and not run.started("flow"):
        _run_stage(EncoderStage(model, settings), model, run, crops, device, workers)
        model.encoder.save_pretrained(run.folder / "encoder")
    _run_stage(FlowStage(model, settings), model, run, crops, device, workers)
    model.eval()
    model.save_pretrained(run.folder / "model")
    return model


def _run_stage(stage: Stage, model: NCSR, run: Run, crops: RandomCrops, device: str, workers: int) -> None:
    settings = run.settings
    optimizer = torch.optim.Adam(stage.parameters(), lr=stage.lr, betas=settings.betas)
    first = 0
    checkpoint = run.latest(stage.name)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]
    run.rewind(stage.name, first)
    generator = torch.Generator(device)
    batches = crop_loader(crops, settings.batch, first, stage.steps, workers)
    progress = tqdm(batches, desc=stage.name, initial=first, total=stage.steps, unit="step", dynamic_ncols=True)
    losses: list[Tensor] = []
    started = time.perf_counter()
    for step, batch in enumerate(progress, start=first):
        hr, lr = to_pair(batch, settings.config.scale, device)
        generator.manual_seed(settings.seed * _NOISE_SEEDS + step)
        if step == 0:
            stage.begin(hr, lr, generator)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(stage.lr, step, stage.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = stage.loss(hr, lr, step, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), settings.max_grad_norm)
        # Adam would spread a NaN over every weight; the check is worth its host synchronisation
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise TrainingDiverged(
                f"stage {stage.name!r}: the loss ({loss.item()}) or the gradient norm ({norm.item()}) of step {step} is not "
                f"finite; the weights are as the last checkpoint in {str(run.folder)!r} has them. Try a lower learning rate."
            )
        optimizer.step()
        losses.append(loss.detach())
        done = step + 1
        if done % settings.log_every == 0 or done == stage.steps:
            mean = float(torch.stack(losses).mean())
            rate = len(losses) / (time.perf_counter() - started)
            run.log(
                stage=stage.name,
                step=done,
                loss=mean,
                grad_norm=norm.item(),
                lr=optimizer.param_groups[0]["lr"],
                steps_per_s=rate,
            )
            progress.set_postfix(loss=f"{mean:.4f}")
            losses.clear()
            started = time.perf_counter()
        if done % settings.validate_every == 0 or done == stage.steps:
            _validate(stage, model, run, done, device)
            started = time.perf_counter()
        # last: what a run stopped before this did since the previous checkpoint, its log included, is done again
        if done % settings.save_every == 0 or done == stage.steps:
            run.save(stage.name, done, model, optimizer)


@torch.no_grad()
def _validate(stage: Stage, model: NCSR, run: Run, step: int, device: str) -> None:
    """Log the mean of every metric over some images, and write a grid of the first of them.

    They are the validation images, or training images where there is no validation folder: the middle of each.
    """
    settings = run.settings
    model.eval()
    generator = torch.Generator(device).manual_seed(_VALIDATION_SEED)
    rows: list[dict[str, float]] = []
    for path in list_images(settings.validation or settings.images)[: settings.validation_images]:
        image = _middle(read_image(path), 2 * settings.config.scale)[None].to(device)
        hr, lr = to_float(image), to_float(degrade(image, settings.config.scale))
        metrics, images = stage.validate(hr, lr, generator)
        if not rows:
            shown = [F.interpolate(lr, size=hr.shape[2:], mode="nearest")[0], *images, hr[0]]
            name = f"{stage.name}-{step:08d}.png"
            write_image(Path(run.folder) / "samples" / name, torch.cat(shown, dim=2))
        rows.append(metrics)
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    run.log(stage=stage.name, step=step, images="validation" if settings.validation else "training", validation=means)
    tqdm.write(f"{stage.name} {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()))
    model.train()


def _middle(image: Tensor, multiple: int) -> Tensor:
    """The middle of (3, H, W), at most 512×512, its sides multiples of `multiple`."""
    for axis in (1, 2):
        side = min(image.shape[axis], _VALIDATED)
        image = image.narrow(axis, (image.shape[axis] - side) // 2, side)
    return crop_to_multiple(image, multiple)
