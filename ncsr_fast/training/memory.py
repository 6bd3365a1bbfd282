"""How much memory a training step takes, known before it is run, and what to do when it was too much.

The step is run on PyTorch's "meta" device, whose tensors have sizes but neither memory nor values: at the crop and batch of
the run, in less than a minute, on any machine. There the operators are those in plain PyTorch, which keep more: without
checkpointing a step of ncsr-x4 takes up to 4 % less than is said here, with it as much as is said; small models up to a fifth
less.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from ncsr_fast.memory import peak_bytes
from ncsr_fast.model import NCSR
from ncsr_fast.training.model import random_model
from ncsr_fast.training.settings import TrainSettings

_USABLE = 0.9  # of the memory there is; the rest for what is not tensors
_MEASURED = 8  # crops measured beside one crop; at least, so that what grows with the batch outweighs what does not
_GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors that a step of one stage takes in each process."""

    kept: int  # weights and Adam's state
    gradients: int
    sizes: tuple[int, int]  # two batches that were measured, in crops
    peaks: tuple[int, int]  # what their steps took beyond `kept`, the gradients included

    @property
    def per_crop(self) -> float:
        return (self.peaks[1] - self.peaks[0]) / (self.sizes[1] - self.sizes[0])

    def total(self, batch: float) -> int:
        """Of a step of `batch` crops: linear through the two that were measured, and exact there."""
        return round(self.kept + self.peaks[0] + self.per_crop * (batch - self.sizes[0]))

    def fitting(self, available: float) -> float:
        """How many crops take `available` bytes; below 1 where not even one fits."""
        return (available - self.kept - self.peaks[0]) / self.per_crop + self.sizes[0]


@dataclass(frozen=True, eq=False)
class Variant:
    """The stages of a run at one precision, with or without checkpointing."""

    precision: str
    checkpoint: bool
    stages: dict[str, StepMemory]  # by what they are called in the table

    @property
    def worst(self) -> StepMemory:
        """The stage that takes most as the batch grows."""
        return max(self.stages.values(), key=lambda step: step.per_crop)

    def total(self, batch: float) -> int:
        """Bytes that the run takes at most."""
        return max(step.total(batch) for step in self.stages.values())

    def fitting(self, available: float) -> float:
        """How many crops all stages have room for in the usable part of `available` bytes."""
        return min(step.fitting(_USABLE * available) for step in self.stages.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate` found; as a string, a table."""

    crop: int
    batch: int  # crops of each process
    parameters: int
    variants: tuple[Variant, ...]  # that of the settings first
    available: int | None  # bytes

    @property
    def total(self) -> int:
        """Bytes of tensors that the run takes at most in each process, as it is configured."""
        return self.variants[0].total(self.batch)

    def __str__(self) -> str:
        stages = list(self.variants[0].stages)
        head = ["precision", "checkpoint", *stages, "a crop more"]
        head += [f"largest batch in {self.available / _GIB:.1f} GiB"] if self.available else []
        rows = [head]
        for variant in self.variants:
            row = [variant.precision, str(variant.checkpoint).lower()]
            row += [f"{variant.stages[name].total(self.batch) / _GIB:.2f}" for name in stages]
            row.append(f"{variant.worst.per_crop / _GIB:.3f}")
            if self.available:
                row.append(str(max(0, math.floor(variant.fitting(self.available)))))
            rows.append(row)
        rows[1].append("  <- as configured")
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        table = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) + "".join(row[len(head) :]) for row in rows]
        last = list(self.variants[0].stages.values())[-1]
        state = last.kept - 4 * self.parameters
        notes = [
            f"Of it: weights {4 * self.parameters / _GIB:.2f}, gradients {last.gradients / _GIB:.2f}, Adam's state "
            f"{state / _GIB:.2f}; the rest are activations, which grow with batch · crop².",
            "Tensors alone: CUDA's context, cuDNN's workspaces and fragmentation come on top (the largest batch leaves a tenth",
            f"for them), and {last.kept / _GIB:.2f} while a step is captured as a CUDA graph, for a copy of weights and state.",
        ]
        what = f"{self.batch} crops of {self.crop}×{self.crop} pixels, {self.parameters / 1e6:.1f} M weights"
        return "\n".join([f"Memory of a step in each process, GiB: {what}", "", *table, "", *notes])


def estimate(
    settings: TrainSettings, *, available: int | None = None, processes: int = 1, alternatives: bool = True
) -> MemoryEstimate:
    """The memory of a run with these settings, and with the other precisions and with or without checkpointing.

    Args:
        settings: Of the run.
        available: Bytes, to say what batch they hold. None: those of the GPU, where there is one.
        processes: Number of processes that share the batch, each on a device of its own.
        alternatives: False leaves out all but the precision and the checkpointing of the settings, in a quarter of the time.
    """
    if available is None and torch.cuda.is_available():
        available = available_memory("cuda")
    batch = math.ceil(settings.batch / processes)
    precisions = (settings.precision, "fp32" if settings.precision == "bf16" else "bf16")
    ways = [(precision, way) for precision in precisions for way in (settings.checkpoint, not settings.checkpoint)]
    ways = ways if alternatives else ways[:1]
    sizes = (1, max(batch, _MEASURED))
    encoder = _encoder_stage(settings, sizes)
    variants = tuple(Variant(*way, {**encoder, **_flow_stages(settings, *way, sizes)}) for way in ways)
    parameters = sum(parameter.numel() for parameter in _model(settings).parameters())
    return MemoryEstimate(settings.crop, batch, parameters, variants, available)


def available_memory(device: torch.device | str) -> int:
    """Bytes of memory of a GPU, or of the machine for "cpu"; used ones too."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def advice(settings: TrainSettings, error: BaseException, available_bytes: int | None = None, processes: int = 1) -> str:
    """A message for a run that is out of memory: the memory asked for, and the batches and options that would fit.

    Args:
        settings: Of the run.
        error: The error that ended it.
        processes: That train together.
        available_bytes: None: all of the GPU's, or of the machine's where there is no GPU.
    """
    if available_bytes is None:
        available_bytes = available_memory("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(settings, available=available_bytes, processes=processes)
    now = found.variants[0]
    what = (str(error).strip() or type(error).__name__).splitlines()[0]
    lines = [
        f"out of memory: {what}",
        f"By the estimate {found.batch} crops of {settings.crop}×{settings.crop} pixels in {now.precision} with "
        f"checkpoint={str(now.checkpoint).lower()} take {found.total / _GIB:.2f} GiB of tensors, of "
        f"{available_bytes / _GIB:.2f} GiB that there are.",
    ]
    if now.fitting(available_bytes) >= found.batch:
        lines.append("That should fit: is something else using this memory? Or give a smaller --batch or --crop.")
        if isinstance(error, torch.cuda.OutOfMemoryError):
            lines.append("If nothing is (nvidia-smi), it is in pieces: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.")
    elif options := _options(settings, found, processes):
        lines += ["What should fit, one of:", *(f"  {option:28} {why}".rstrip() for option, why in options)]
    else:
        lines.append("Not even one small crop fits: it takes a smaller model, or a larger machine.")
    return "\n".join(lines)


def _options(settings: TrainSettings, found: MemoryEstimate, processes: int) -> list[tuple[str, str]]:
    """Options of the command line that would fit, and what to know of each; those that keep the batch first."""
    now, options = found.variants[0], []
    fitting = {variant: math.floor(variant.fitting(found.available)) for variant in found.variants}
    for variant in (variant for variant in found.variants if variant is now or variant.checkpoint):
        crops = min(fitting[variant], found.batch)
        if crops < 1 or (variant is not now and crops <= fitting[now]):
            continue
        changed = [] if crops == found.batch else [f"--batch {crops * processes}"]
        changed += ["--checkpoint true"] * (variant.checkpoint != settings.checkpoint)
        changed += [f"--precision {variant.precision}"] * (variant.precision != settings.precision)
        options.append((-crops, " ".join(changed), f"{variant.total(crops) / _GIB:.2f} GiB"))
    options = [(option, why) for _, option, why in sorted(options)]
    if fitting[now] >= 1:
        needed = math.ceil(settings.batch / fitting[now])
        options.append((f"{needed} processes", f"torchrun --nproc-per-node {needed}, with a device for each"))
    unit = settings.crop_unit
    share = max(now.fitting(found.available), 0) / found.batch  # of the pixels, which is what the activations grow with
    crop = math.floor(settings.crop * math.sqrt(share) / unit) * unit
    if crop:
        options.append((f"--crop {crop}", ""))
    return options


def _model(settings: TrainSettings) -> NCSR:
    with torch.device("meta"):
        return random_model(settings)


def _encoder_stage(settings: TrainSettings, sizes: tuple[int, int]) -> dict[str, StepMemory]:
    """It is computed in one way whatever the options say."""
    from ncsr_fast.training.stages import EncoderStage

    return {"encoder stage": _step(settings, EncoderStage, 0, sizes)} if settings.encoder_steps else {}


def _flow_stages(settings: TrainSettings, precision: str, checkpoint: bool, sizes: tuple[int, int]) -> dict[str, StepMemory]:
    from ncsr_fast.training.stages import FlowStage

    settings, stages = replace(settings, precision=precision, checkpoint=checkpoint), {}
    if settings.unfreeze > 0:
        stages["flow, encoder frozen"] = _step(settings, FlowStage, 0, sizes)
    if settings.unfreeze < 1:
        stages["flow, encoder trained"] = _step(settings, FlowStage, 1, sizes)
    return stages


def _step(settings: TrainSettings, kind: type, phase: int, sizes: tuple[int, int]) -> StepMemory:
    model = _model(settings)
    stage = kind(model, settings)
    stage.begin_phase(phase)
    # weights without a gradient, as those of a frozen encoder, have no state: Adam makes it at their first step
    peaks = tuple(peak_bytes(lambda size=size: _run(stage.objective, settings, size)) for size in sizes)
    weights = sum(_bytes(parameter) for parameter in model.parameters())
    gradients = sum(_bytes(parameter) for parameter in model.parameters() if parameter.grad is not None)
    return StepMemory(weights + 2 * gradients, gradients, sizes, peaks)


@torch.enable_grad()
def _run(objective: nn.Module, settings: TrainSettings, batch: int) -> None:
    """Forward and backward pass of a step, from the bytes of the crops on."""
    from ncsr_fast.training.batch import Draws

    objective.zero_grad(set_to_none=True)
    crop, small = settings.crop, settings.crop // settings.model.scale
    with torch.device("meta"):
        sizes = ((3, crop), (settings.model.traits.lr_channels, small))
        hr, lr = (torch.empty(batch, channels, side, side, dtype=torch.uint8) for channels, side in sizes)
        std, noise = (torch.empty(shape, dtype=torch.float32) for shape in ((batch, 1, 1, 1), (batch, 3, crop, crop)))
        flips, reference = (torch.empty(batch, dtype=torch.bool) for _ in range(2))
        draws = Draws(std, noise, flips, torch.empty(batch, dtype=torch.int64), reference)
    objective(hr, lr, *draws)[0].backward()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
