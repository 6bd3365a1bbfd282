"""A run of both stages, and the training loop of a stage."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ncsr_fast.data.cache import remove_caches
from ncsr_fast.data.crops import RandomCrops, crop_loader
from ncsr_fast.data.search import named
from ncsr_fast.graphs import TrainingStep, adam
from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.model import NCSR
from ncsr_fast.synchronization import reading_is_free
from ncsr_fast.training.batch import Draws, stacked
from ncsr_fast.training.diagnose import without_texture
from ncsr_fast.training.folder import check_folder
from ncsr_fast.training.lock import sole_writer
from ncsr_fast.training.memory import advice
from ncsr_fast.training.processes import Processes, StopSignals, TrainingStopped, joined
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import EncoderStage, FlowStage, Stage
from ncsr_fast.training.start import Start, prepared
from ncsr_fast.training.validation import Validation, lower

_EXAMINED = 256  # crops examined after a run has diverged
_NAMED = 5  # images that an error names


class TrainingDiverged(ArithmeticError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class TrainingOutOfMemory(MemoryError):
    """A step needs more memory than there is; the message says what would fit."""


def train(settings: TrainSettings, folder: str | os.PathLike, device: str = "auto", *, report: Sequence[str] = ()) -> NCSR:
    """Train a model and write it to `folder`/model, or resume a stopped run in `folder`.

    A run that is stopped at any moment and started again ends with the same weights, bit for bit, as an uninterrupted run
    (on a GPU as far as PyTorch's kernels are deterministic). No random generator needs to be restored: the crops, the noise
    and the learning rate of a step depend only on the seed and the step's number. Resuming a run with other images gives a
    warning.

    Everything is checked before the first file is written, and a start that fails leaves nothing behind. Only one process at
    a time trains in a folder: see `sole_writer`.

    Several processes started by torchrun train together: `settings.batch` is the batch of all of them, and the result is that
    of one process.

    Args:
        settings: The settings of the run.
        folder: The folder of the run: new, empty, or of a stopped run, and outside the folders of images.
        device: "auto", "cpu", "cuda" or "cuda:1" and so on.
        report: Lines to write to RUN/published_options.txt.

    Returns:
        The trained model, in eval mode and float32.

    Raises:
        ValueError, OSError, ImportError: The run cannot start; the message names the settings or files, one per line.
        RunInUse: Another process trains in the folder.
        OtherProcessFailed: The run cannot start in another process.
        TrainingDiverged: `max_skipped` steps in a row were not finite; the last checkpoint stays.
        TrainingOutOfMemory: A step needs more memory than there is.
        TrainingStopped: SIGTERM or Ctrl-C was received; the run has saved itself.
    """
    folder = Path(folder).expanduser()
    with joined(device) as processes, StopSignals() as signals, ExitStack() as stack:
        processes.together(lambda: check_folder(settings, folder) if processes.first else None)
        processes.together(lambda: stack.enter_context(sole_writer(folder)) if processes.first else None)
        start = processes.together(lambda: prepared(settings, folder, processes))
        signals.started()
        start.write(tuple(report))
        if start.changed is not None:
            _warn_of_other_images(start)
        model, run = start.model.to(processes.device).train(), start.run
        # of each machine its own
        start.crops.keep_decoded(folder / "cache" / platform.node(), int(settings.cache_gib * 2**30))
        processes.wait()  # until the first process has removed or made files
        validation = Validation(model, run, processes, start.pairs)
        try:
            if settings.encoder_steps and "flow" not in start.checkpoints:
                stage = EncoderStage(model, settings)
                StageLoop(stage, model, run, start.crops, processes, signals, validation).run(start.checkpoints)
                run.save_model(model.encoder, "encoder")
            stage = FlowStage(model, settings)
            StageLoop(stage, model, run, start.crops, processes, signals, validation).run(start.checkpoints)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingOutOfMemory(advice(settings, error, processes=processes.world)) from error
        model.eval()
        run.save_model(model, "model")
        if processes.first:
            remove_caches(run.folder / "cache")
        processes.wait()  # until the model is written, for programs that read it next
    return model


def _warn_of_other_images(start: Start) -> None:
    """Warn, and log after the steps done so far, that the run continues with other images."""
    stage, checkpoint = next(iter(start.checkpoints.items()), ("encoder", {"step": 0}))
    start.run.log(stage, checkpoint["step"], event="other images", changed=start.changed)
    warnings.warn(
        f"the images are not those that the run in {str(start.run.folder)!r} began with: {start.changed}. The run "
        "continues with the new images, and its result will differ",
        stacklevel=3,
    )


class StageLoop:
    """A stage of a run, from its newest checkpoint to its last step."""

    def __init__(
        self,
        stage: Stage,
        model: NCSR,
        run: Run,
        crops: RandomCrops,
        processes: Processes,
        signals: StopSignals,
        validation: Validation,
    ) -> None:
        self.stage, self.model, self.run_folder, self.crops = stage, model, run, crops
        self.processes, self.signals, self.settings = processes, signals, run.settings
        self.validation = validation
        self.generator = torch.Generator(processes.device)
        groups = stage.groups()
        self.base_rates = [group["lr"] for group in groups]
        self.optimizer = adam(groups, lr=0.0, betas=self.settings.betas, weight_decay=self.settings.weight_decay)
        self.best: float | None = None  # lowest nll so far
        self.first = 0
        self.step: TrainingStep | None = None
        self.reported = 0  # number of skipped steps in the log

    def run(self, checkpoints: dict[str, dict]) -> None:
        """Train from the stage's checkpoint, which is removed from `checkpoints`, or from the first step."""
        settings, steps = self.settings, self.stage.steps
        checkpoint = checkpoints.pop(self.stage.name, None)
        if checkpoint is not None:
            self.first = checkpoint["step"]
        self.begin(self.first, checkpoint)
        del checkpoint  # its weights have been copied
        self.run_folder.rewind(self.stage.name, self.first)
        self._validate_after_checkpoint()
        losses: list[Tensor] = []
        waited, started = 0.0, time.perf_counter()
        with self._progress() as progress:
            batches = self.batches()
            for number in range(self.first, steps):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                inputs = self.inputs(batch, number, self.processes.share(settings.batch))
                parts, norm = self.advance(number, inputs)
                losses.append(parts.clone())
                progress.update()
                done = number + 1
                if done % settings.log_every == 0 or done == steps or reading_is_free(parts):
                    self._check_skipped(number)
                if done % settings.log_every == 0 or done == steps:
                    elapsed = time.perf_counter() - started
                    self._log(done, losses, norm, elapsed, waited, progress)
                    losses.clear()
                    waited, started = 0.0, time.perf_counter()
                # a run stopped before this line repeats the steps since the previous checkpoint, and their log
                stop = self.processes.largest(self.signals.received)
                if done % settings.save_every == 0 or done == steps or stop:
                    self.save(done)
                if stop:
                    raise TrainingStopped(
                        f"stopped by signal {stop} after step {done} of stage {self.stage.name!r} and saved in "
                        f"{str(self.run_folder.folder)!r}; the same command resumes the run",
                        stop,
                    )
                if self._is_validated(done):  # after the checkpoint, so that an error in validation loses no training
                    paused = time.perf_counter()
                    self.best = self.validation(self.stage, done, self.best)
                    started += time.perf_counter() - paused

    def _is_validated(self, done: int) -> bool:
        return done % self.settings.validate_every == 0 or done == self.stage.steps

    def _validate_after_checkpoint(self) -> None:
        """Do the validation that follows the first checkpoint, unless it is already in the log."""
        if not self.first or not self._is_validated(self.first):
            return
        means, *_ = self.processes.gathered(
            self.run_folder.validated(self.stage.name, self.first)
        )  # as the first process reads it
        if means is None:
            self.best = self.validation(self.stage, self.first, self.best)
        else:
            self.best = lower(self.best, means)

    def begin(self, number: int, checkpoint: dict | None) -> None:
        """Prepare for step `number`, from a checkpoint or, at the start of the stage, from the first batch."""
        self.phase = self.stage.phase(number)
        self.stage.begin_phase(self.phase)
        self.step = None
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            state = {"state": checkpoint["optimizer"], "param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(state)
            self.best = checkpoint["best"]
        elif self.stage.steps:
            # with the batch of all processes, so that the statistics are those of a single process
            everything = slice(None)
            hr, lr, *draws = self.inputs(self.crops.batch(0, self.settings.batch), 0, everything)
            self.stage.initialize(hr, lr, Draws(*draws))
        self.step = self._training_step()
        if checkpoint is not None:
            self.step.counters.copy_(checkpoint["counters"])
            self.step.rate.copy_(checkpoint["rate"])
            self.reported = int(checkpoint["counters"][1])

    def _training_step(self) -> TrainingStep:
        settings = self.settings
        graph = settings.graph
        if graph is None:
            graph = self.processes.device.type == "cuda" and self.processes.world == 1
        step = TrainingStep(
            self.processes.parallel(self.stage.objective),
            self.optimizer,
            max_grad_norm=settings.max_grad_norm,
            loss=lambda objective, *inputs: objective(*inputs),
            graph=graph,
            backoff=settings.backoff,
            reduce=self.processes.mean_,
        )
        if self.step is not None:
            step.counters.copy_(self.step.counters)
            step.rate.copy_(self.step.rate)
        return step

    def advance(self, number: int, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """Do step `number` and return the parts of its loss and the gradient norm, on the device."""
        phase = self.stage.phase(number)
        if phase != self.phase:
            self.phase = phase
            self.stage.begin_phase(phase)
            self.step = self._training_step()
        for group, base in zip(self.optimizer.param_groups, self.base_rates):
            rate = self.settings.learning_rate(base, number, self.stage.steps)
            group["lr"].fill_(rate).mul_(self.step.rate)
        return self.step(*inputs)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's share of the batches from the first step on."""
        s, p = self.settings, self.processes
        return iter(crop_loader(self.crops, s.batch, self.first, self.stage.steps, s.workers, p.rank, p.world))

    def inputs(self, batch: dict[str, Tensor], number: int, share: slice) -> tuple[Tensor | None, ...]:
        """The arguments of `stage.objective`."""
        crops = (batch["hr"], stacked(batch))
        hr, lr = (None if crop is None else crop.to(self.processes.device, non_blocking=True) for crop in crops)
        return hr, lr, *Draws.at_step(number, self.settings, self.generator, share)

    def _progress(self) -> tqdm:
        return tqdm(
            desc=self.stage.name,
            initial=self.first,
            total=self.stage.steps,
            unit="step",
            dynamic_ncols=True,
            disable=not self.processes.first,
        )

    def _log(self, done: int, losses: list[Tensor], norm: Tensor, elapsed: float, waited: float, progress: tqdm) -> None:
        parts = torch.stack(losses)
        sound = parts[parts.isfinite().all(dim=1)]  # without skipped steps, which would make the mean NaN
        means = dict(zip(self.stage.parts, sound.mean(dim=0).tolist())) if len(sound) else {}
        row = {
            **means,
            "grad_norm": norm.item(),
            "lr": self.optimizer.param_groups[0]["lr"].item(),
            "skipped": int(self.step.counters[1]),
            "steps_per_s": len(losses) / elapsed,
            "images_per_s": len(losses) * self.settings.batch / elapsed,
            "data_wait": waited / elapsed,
        }
        self.run_folder.log(self.stage.name, done, **row)
        progress.set_postfix({key: f"{value:.4f}" for key, value in means.items()})

    def _check_skipped(self, number: int) -> None:
        """Report steps skipped since the last call; end the run after too many in a row."""
        done, skipped, in_a_row, last = self.step.counters.tolist()
        if skipped == self.reported:
            return
        bad = number - (done - 1 - last)
        where = self._origin(bad)
        count, self.reported = skipped - self.reported, skipped
        self.run_folder.log(self.stage.name, bad + 1, event="skipped", count=count, where=where)
        message = (
            f"stage {self.stage.name!r}, step {bad + 1}: the loss or its gradient is not finite, first in {where}; "
            f"the step was skipped ({in_a_row} in a row, {skipped} in all)"
        )
        if self.processes.first:
            tqdm.write(message)
        if in_a_row >= self.settings.max_skipped:
            raise TrainingDiverged(
                f"{message}. The checkpoints in {str(self.run_folder.folder)!r} are from before. {self._flat_images(number)}"
                "Try a lower learning rate, backoff 0.5, a smaller max_grad_norm or precision fp32 in a new run: "
                f"{self.run_folder.continued()}."
            )

    def _flat_images(self, number: int) -> str:
        """Advice about flat images among the crops up to step `number`, if their likelihood has no bound."""
        if self.stage.name != "flow" or self.settings.max_std > 0:
            return ""
        stop = (number + 1) * self.settings.batch
        crops = range(max(0, stop - _EXAMINED), stop)
        flat = [crop for crop in crops if without_texture(self.crops[crop]["hr"][None])]
        names = list(dict.fromkeys(map(self.crops.name, flat)))
        if not names:
            return ""
        return (
            f"{len(flat)} of the last {len(crops)} crops are flat, from {len(names)} images: {named(names, _NAMED)}. "
            "Without noise (max_std 0, as in SRFlow) the likelihood of flat images has no bound: leave them out, or train with "
            "noise, --max-std 0.02 or --variant noise. If that is not the cause: "
        )

    def _origin(self, number: int) -> str:
        """The first tensor of step `number` that is not finite, from the first process that finds one."""
        share = self.processes.share(self.settings.batch)
        batch = {key: tensor[share] for key, tensor in self.crops.batch(number, self.settings.batch).items()}
        found = self.processes.gathered(self.stage.diagnose(*self.inputs(batch, number, share)))
        return next((where for where in found if where is not None), "nothing, with the present weights")

    def save(self, done: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "counters": self.step.counters,
            "rate": self.step.rate,
            "best": self.best,
        }
        self.run_folder.save(self.stage.name, done, state)
