"""The run of both stages, and the training loop of one."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ncsr_fast.data.crops import RandomCrops, crop_loader
from ncsr_fast.graphs import TrainingStep, adam
from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.nn.encoder import RRDB
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.synchronization import reading_is_free
from ncsr_fast.training.batch import Draws
from ncsr_fast.training.memory import advice
from ncsr_fast.training.processes import Processes, StopSignals, TrainingStopped, joined
from ncsr_fast.training.run import Run
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import EncoderStage, FlowStage, Stage
from ncsr_fast.training.validation import Validation


class TrainingDiverged(ArithmeticError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class TrainingOutOfMemory(MemoryError):
    """A step needs more memory than there is; the message says what would fit."""


def train(settings: TrainSettings, folder: str | os.PathLike, device: str = "auto") -> NCSR:
    """Train a model from nothing to `folder`/model, or go on where a run in `folder` was stopped.

    A run that is stopped at any moment, by whatever, and started again ends with the same weights, bit for bit, as one that
    was not (on a GPU as far as PyTorch's kernels there are deterministic). There is no state of a random generator to
    restore: the crops, the noise and the learning rate of a step are decided by the seed and its number alone.

    Started by torchrun in several processes, these train together: `settings.batch` is the batch of all of them, and they do
    to it what one process would.

    returns  the model, in eval mode
    raises   ValueError for a folder with a run of other settings or without a usable image; TrainingDiverged after
             `max_skipped` steps in a row that are not finite, with the last checkpoint kept; TrainingOutOfMemory;
             TrainingStopped on SIGTERM or Ctrl-C, after saving
    """
    with joined(device) as processes, StopSignals() as signals:
        run = Run(folder, settings, writes=processes.first)
        crops = RandomCrops(
            settings.images,
            settings.lr_images,
            scale=settings.model.scale,
            crop=settings.crop,
            seed=settings.seed,
            degradation=settings.degradation,
            cache_folder=run.folder / "cache" / platform.node(),  # of each machine its own
            cache_bytes=int(settings.cache_gib * 2**30),
        )
        processes.wait()  # for what the first of them removed or made
        model = _model(settings).to(processes.device).train()
        try:
            if settings.encoder_steps and not run.started("flow"):
                StageLoop(EncoderStage(model, settings), model, run, crops, processes, signals).run()
                if processes.first:
                    model.encoder.save_pretrained(run.folder / "encoder")
            StageLoop(FlowStage(model, settings), model, run, crops, processes, signals).run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingOutOfMemory(advice(settings, error, processes=processes.world)) from error
        model.eval()
        if processes.first:
            model.save_pretrained(run.folder / "model")
            shutil.rmtree(run.folder / "cache", ignore_errors=True)
        processes.wait()  # until the model is there for whoever reads it next
    return model


def _model(settings: TrainSettings) -> NCSR:
    torch.manual_seed(settings.seed)
    model = NCSR(settings.model, precision=settings.precision, checkpoint=settings.checkpoint)
    if settings.start_from is not None:
        model.load_published(NCSR.from_pretrained(settings.start_from).published_state_dict())
    if settings.encoder_weights is not None:
        model.encoder.load_published(RRDB.from_pretrained(settings.encoder_weights).published_state_dict())
    return model


class StageLoop:
    """A stage of a run, from its newest checkpoint to its last step."""

    def __init__(
        self, stage: Stage, model: NCSR, run: Run, crops: RandomCrops, processes: Processes, signals: StopSignals
    ) -> None:
        self.stage, self.model, self.run_folder, self.crops = stage, model, run, crops
        self.processes, self.signals, self.settings = processes, signals, run.settings
        self.validation = Validation(model, run, processes)
        self.generator = torch.Generator(processes.device)
        groups = stage.groups()
        self.base_rates = [group["lr"] for group in groups]
        self.optimizer = adam(groups, lr=0.0, betas=self.settings.betas, weight_decay=self.settings.weight_decay)
        self.best: float | None = None  # of the validations so far
        self.first = 0
        self.step: TrainingStep | None = None
        self.reported = 0  # skipped steps that are in the log

    def run(self) -> None:
        settings, steps = self.settings, self.stage.steps
        checkpoint = self.run_folder.latest(self.stage.name)
        if checkpoint is not None:
            self.first = checkpoint["step"]
        self.begin(self.first, checkpoint)
        self.run_folder.rewind(self.stage.name, self.first)
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
                if done % settings.validate_every == 0 or done == steps:
                    paused = time.perf_counter()
                    self.best = self.validation(self.stage, done, self.best)
                    started += time.perf_counter() - paused
                # last: what a run stopped before this did since the previous checkpoint, its log included, is done again
                stop = self.processes.largest(self.signals.received)
                if done % settings.save_every == 0 or done == steps or stop:
                    self.save(done)
                if stop:
                    raise TrainingStopped(
                        f"stopped by signal {stop} after step {done} of stage {self.stage.name!r} and saved in "
                        f"{str(self.run_folder.folder)!r}; the same command resumes the run",
                        stop,
                    )

    # -- a step ----------------------------------------------------------------------------------------------

    def begin(self, number: int, checkpoint: dict | None) -> None:
        """Be ready for step `number`, after a checkpoint or, at the start of the stage, a look at the first batch."""
        self.phase = self.stage.phase(number)
        self.stage.begin_phase(self.phase)
        self.step = None
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            state = {"state": checkpoint["optimizer"], "param_groups": self.optimizer.state_dict()["param_groups"]}
            self.optimizer.load_state_dict(state)
            self.best = checkpoint["best"]
        elif self.stage.steps:
            # with the batch of all processes: the same statistics in each, and those that one alone would find
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
        """Do step `number`: the parts of its loss, and the gradient norm, on the device."""
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
        """What `stage.objective` takes."""
        hr, lr = (batch[key].to(self.processes.device, non_blocking=True) if key in batch else None for key in ("hr", "lr"))
        return hr, lr, *Draws.of_step(number, self.settings, self.generator, share)

    # -- what is said and kept -------------------------------------------------------------------------------

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
        sound = parts[parts.isfinite().all(dim=1)]  # a skipped step would make the mean NaN
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
        """Report steps that were skipped since the last look; end the run after too many in a row."""
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
                f"{message}. The checkpoints in {str(self.run_folder.folder)!r} are from before. Try a lower learning rate, "
                "backoff 0.5, a smaller max_grad_norm, precision fp32; or resume from a checkpoint with another seed."
            )

    def _origin(self, number: int) -> str:
        """Where step `number` was first not finite, in the share of the first process that finds it with the weights it has."""
        share = self.processes.share(self.settings.batch)
        batch = {key: tensor[share] for key, tensor in self.crops.batch(number, self.settings.batch).items()}
        found = self.processes.gathered(self.stage.diagnose(*self.inputs(batch, number, share)))
        return next((where for where in found if where is not None), "nothing, with the weights as they are by now")

    def save(self, done: int) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "counters": self.step.counters,
            "rate": self.step.rate,
            "best": self.best,
        }
        self.run_folder.save(self.stage.name, done, state)
