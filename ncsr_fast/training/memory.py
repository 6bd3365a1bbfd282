"""Estimates of the memory of a training step, before it is run, and advice after it ran out of memory.

The step is run on PyTorch's "meta" device, whose tensors have sizes but neither memory nor values. It has the crop and batch of
the run, takes less than a minute, and runs on any machine. On "meta" the reference operators run, which save more for the
backward pass, so the estimate is an upper bound. For ncsr-x4 it is exact with checkpointing, and up to 4 % above the real peak
without; for small models it is up to a fifth too high.
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

_USABLE = 0.9  # share of the memory that tensors may take
_MEASURED = 8  # crops in the larger measurement; enough for the part that grows with the batch to dominate
_GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors that a step of one stage takes in each process."""

    persistent: int  # weights and Adam's state
    gradients: int
    sizes: tuple[int, int]  # two batches that were measured, in crops
    peaks: tuple[int, int]  # bytes that their steps took besides `persistent`, with the gradients

    @property
    def per_crop(self) -> float:
        return (self.peaks[1] - self.peaks[0]) / (self.sizes[1] - self.sizes[0])

    def total(self, batch: float) -> int:
        """Bytes of a step of `batch` crops: linear through the two measured batches, and exact for them."""
        return round(self.persistent + self.peaks[0] + self.per_crop * (batch - self.sizes[0]))

    def fitting(self, available: float) -> float:
        """The number of crops that take `available` bytes; below 1 if not even one fits."""
        return (available - self.persistent - self.peaks[0]) / self.per_crop + self.sizes[0]


@dataclass(frozen=True, eq=False)
class Variant:
    """The stages of a run at one precision, with or without checkpointing."""

    precision: str
    checkpoint: bool
    stages: dict[str, StepMemory]  # by their names in the table

    @property
    def worst(self) -> StepMemory:
        """The stage whose memory grows fastest with the batch."""
        return max(self.stages.values(), key=lambda step: step.per_crop)

    def total(self, batch: float) -> int:
        """The largest number of bytes that a stage of the run takes."""
        return max(step.total(batch) for step in self.stages.values())

    def fitting(self, available: float) -> float:
        """The number of crops with which every stage fits in the usable part of `available` bytes."""
        return min(step.fitting(_USABLE * available) for step in self.stages.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """Result of `estimate`; `str` makes a table of it."""

    crop: int
    batch: int  # crops per process
    parameters: int
    variants: tuple[Variant, ...]  # the variant of the settings first
    available: int | None  # bytes

    @property
    def total(self) -> int:
        """The largest number of bytes of tensors in each process, as the run is configured."""
        return self.variants[0].total(self.batch)

    def __str__(self) -> str:
        stages = list(self.variants[0].stages)
        head = ["precision", "checkpoint", *stages, "each crop"]
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
        state = last.persistent - 4 * self.parameters
        notes = [
            f"This includes weights {4 * self.parameters / _GIB:.2f}, gradients {last.gradients / _GIB:.2f}, Adam's state "
            f"{state / _GIB:.2f}; the rest are activations, which grow with batch · crop².",
            "Only tensors count: CUDA's context, cuDNN's workspaces and fragmentation are extra (the largest batch leaves a",
            f"tenth for them), as are {last.persistent / _GIB:.2f} for a copy of weights and state, to capture a CUDA graph.",
        ]
        what = f"{self.batch} crops of {self.crop}×{self.crop} pixels, {self.parameters / 1e6:.1f} M weights"
        return "\n".join([f"Memory of a step in each process, GiB: {what}", "", *table, "", *notes])


def estimate(
    settings: TrainSettings, *, available: int | None = None, processes: int = 1, alternatives: bool = True
) -> MemoryEstimate:
    """The memory of a run with these settings, and with other precisions, with and without checkpointing.

    Args:
        settings: The settings of the run.
        available: Bytes of memory, for which the largest batch is computed. None: the memory of the GPU, if there is one.
        processes: Number of processes that share the batch, each with its own device.
        alternatives: False: estimate only the precision and checkpointing of the settings, in a quarter of the time.
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
    """Bytes of memory of a GPU, or for "cpu" of the machine, including used memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def advice(settings: TrainSettings, error: BaseException, available_bytes: int | None = None, processes: int = 1) -> str:
    """A message about a run that ran out of memory, with the batches and options that would fit.

    Args:
        settings: The settings of the run.
        error: The error that ended the run.
        available_bytes: Bytes of memory. None: all memory of the GPU, or of the machine if there is no GPU.
        processes: Number of processes that train together.
    """
    if available_bytes is None:
        available_bytes = available_memory("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(settings, available=available_bytes, processes=processes)
    now = found.variants[0]
    what = (str(error).strip() or type(error).__name__).splitlines()[0]
    lines = [
        f"out of memory: {what}",
        f"By estimate, {found.batch} crops of {settings.crop}×{settings.crop} pixels in {now.precision} with "
        f"checkpoint={str(now.checkpoint).lower()} take {found.total / _GIB:.2f} GiB of tensors, of "
        f"{available_bytes / _GIB:.2f} GiB available.",
    ]
    if now.fitting(available_bytes) >= found.batch:
        lines.append("That should fit: is something else using this memory? Or give a smaller --batch or --crop.")
        if isinstance(error, torch.cuda.OutOfMemoryError):
            lines.append(
                "If not (see nvidia-smi), the memory is fragmented: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
            )
    elif options := _options(settings, found, processes):
        lines += ["One of these should fit:", *(f"  {option:28} {why}".rstrip() for option, why in options)]
    else:
        lines.append("Not even one small crop fits: use a smaller model or a larger machine.")
    return "\n".join(lines)


def _options(settings: TrainSettings, found: MemoryEstimate, processes: int) -> list[tuple[str, str]]:
    """Options of the command line that would fit, with remarks; options that do not change the batch come first."""
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
        options.append((f"{needed} processes", f"torchrun --nproc-per-node {needed}, with one device per process"))
    unit = settings.crop_unit
    share = max(now.fitting(found.available), 0) / found.batch  # share of the pixels, with which the activations grow
    crop = math.floor(settings.crop * math.sqrt(share) / unit) * unit
    if crop:
        options.append((f"--crop {crop}", ""))
    return options


def _model(settings: TrainSettings) -> NCSR:
    with torch.device("meta"):
        return random_model(settings)


def _encoder_stage(settings: TrainSettings, sizes: tuple[int, int]) -> dict[str, StepMemory]:
    """The memory of the encoder's stage, which does not depend on the options."""
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
    # weights without a gradient, such as a frozen encoder's, have no state, because Adam makes it at their first step
    peaks = tuple(peak_bytes(lambda size=size: _run(stage.objective, settings, size)) for size in sizes)
    weights = sum(_bytes(parameter) for parameter in model.parameters())
    gradients = sum(_bytes(parameter) for parameter in model.parameters() if parameter.grad is not None)
    return StepMemory(weights + 2 * gradients, gradients, sizes, peaks)


@torch.enable_grad()
def _run(objective: nn.Module, settings: TrainSettings, batch: int) -> None:
    """Run the forward and backward pass of a step, including the preparation of its batch."""
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
