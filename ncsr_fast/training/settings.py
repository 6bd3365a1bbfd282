"""The settings of a training run, stored with it and compared when it is resumed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncsr_fast.config import NCSRConfig
from ncsr_fast.engine.options import PRECISIONS

_AT_LEAST_ONE = (
    "batch", "log_every", "validate_every", "save_every", "keep", "validation_images", "validation_size", "max_skipped",
)  # fmt: skip
_NOT_NEGATIVE = (
    "encoder_steps", "steps", "max_std", "nll_weight", "l1_weight", "unfreeze", "weight_decay", "workers", "cache_gib",
)  # fmt: skip
_FINITE = ("milestones", "temperatures", "betas")
_PLACES = ("images", "lr_images", "validation", "validation_lr", "start_from", "encoder_weights")
_POSITIVE = ("encoder_lr", "lr", "unfrozen_lr", "max_grad_norm", "gamma", "backoff")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the two stages: the encoder by L1 (SRFlow's generator pre-training), then the flow by its likelihood.

    Model
    model              the architecture
    start_from         model directory, published .pth or shipped name; both stages start from its weights and actnorms, to
                       fine-tune the model. None: random weights and data-dependent actnorms
    encoder_weights    weights that the encoder starts from: a published RRDB or ESRGAN file, or RUN/encoder of another run.
                       The encoder's long skip always starts at the last block. An ESRGAN generator's starts at the first
                       convolution, so with its weights the encoder does not make the same pictures

    Data (relative paths are relative to the current folder, also in a YAML file; ~ is the home folder; patterns are not
    expanded)
    images             one or several folders of HR images, with their subfolders, and published .pklv4 files
    lr_images          LR images, one place for each of `images`; (): the crops are degraded
    degradation        "bicubic" (MATLAB's), or "module:function" (`ncsr_fast.data.degradation`)
    validation         folder of HR images to validate on; None: training images are used
    validation_lr      folder of LR images of `validation`; None: its images are degraded
    crop, batch        side of an HR crop; crops per step, over all processes together
    flip, rotate       mirror crops at random; turn crops by a random multiple of 90°
    workers            processes that read images, for each training process; 0: images are read between steps
    cache_gib          largest size in GiB of the cache of decoded images in RUN/cache, which is removed after the run

    The encoder's stage
    encoder_steps      number of steps; 0: no such stage
    encoder_lr         learning rate

    The flow's stage
    steps, lr          number of steps; Adam's learning rate
    unfreeze           fraction of the stage after which the encoder is trained too (0: from the start, 1: never)
    unfrozen_lr        learning rate of the encoder from then on; None: `lr`
    max_std            largest standard deviation M of NCSR's noise, c ~ U(0, M)
    lr_noise           add the noise, downsampled, to the LR image too
    nll_weight, l1_weight   loss = nll_weight · NLL + l1_weight · mean |temperature-0 sample - hr| (published `weight_fl`,
                       `weight_l1`)

    Both stages
    milestones, gamma  the learning rate is multiplied by gamma at each milestone: a step, or below 1 a fraction of a stage
    betas, weight_decay  Adam's settings
    max_grad_norm      norm that gradients are clipped to; None: no clipping
    max_skipped        number of skipped steps in a row that ends the run; a step is skipped if its loss or gradient is not
                       finite
    backoff            factor of the learning rate at each skipped step (1: no change)
    seed               seed of weights, crops and noise

    Evaluation (only precision changes results by more than rounding)
    precision          precision of the networks: "fp32", "tf32", "bf16"
    checkpoint         recompute the networks' hidden layers in the backward pass instead of saving them
    graph              capture steps as CUDA graphs; None: on a GPU, if a single process trains

    Output
    log_every, validate_every, save_every   intervals in steps
    keep               number of checkpoints of each stage that stay on disk
    validation_images  number of images used of the validation folder
    validation_size    side in pixels of the middle part of an image that is used
    temperatures       temperatures of the samples drawn at each validation
    tensorboard        write scalars and samples to RUN/tensorboard
    """

    model: NCSRConfig
    images: tuple[str, ...]
    lr_images: tuple[str, ...] = ()
    degradation: str = "bicubic"
    validation: str | None = None
    validation_lr: str | None = None
    start_from: str | None = None
    encoder_weights: str | None = None
    crop: int = 160
    batch: int = 18
    flip: bool = True
    rotate: bool = True
    workers: int = 4
    cache_gib: float = 32.0
    encoder_steps: int = 200_000
    encoder_lr: float = 2e-4
    steps: int = 220_000
    lr: float = 2e-4
    unfreeze: float = 0.5
    unfrozen_lr: float | None = None
    max_std: float = 0.05
    lr_noise: bool = True
    nll_weight: float = 1.0
    l1_weight: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    gamma: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float | None = 100.0
    max_skipped: int = 10
    backoff: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    checkpoint: bool = True
    graph: bool | None = None
    log_every: int = 20
    validate_every: int = 1000
    save_every: int = 1000
    keep: int = 3
    validation_images: int = 8
    validation_size: int = 512
    temperatures: tuple[float, ...] = (0.0, 0.8)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "lr_images", "milestones", "betas", "temperatures"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, os.PathLike)) else tuple(value))
        for name in _PLACES:
            value = getattr(self, name)
            paths = tuple(_path(name, path) for path in (value if isinstance(value, tuple) else (value,)) if path is not None)
            object.__setattr__(self, name, paths if isinstance(value, tuple) else next(iter(paths), None))
        if not self.images:
            raise ValueError("images must name at least one folder of HR images or .pklv4 file")
        if self.lr_images and len(self.lr_images) != len(self.images):
            raise ValueError(f"lr_images must name one place for each of the {len(self.images)} of images: {self.lr_images}")
        if self.lr_images and self.degradation != "bicubic":
            raise ValueError("degradation makes LR images, but lr_images names LR images too: give one of the two")
        for names, sound, what in (
            (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
            (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more and finite"),
            (_POSITIVE, lambda value: 0 < value < math.inf, "positive and finite"),
            (_FINITE, lambda value: all(map(math.isfinite, value)), "finite"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not sound(value):
                    raise ValueError(f"{name} must be {what}, not {value!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if self.backoff > 1:
            raise ValueError(f"backoff must be at most 1, not {self.backoff!r}")
        if self.crop < 1 or self.crop % (2 * self.model.scale):
            raise ValueError(f"crop must be a positive multiple of 2·scale = {2 * self.model.scale}, not {self.crop!r}")
        if self.validation_size < 2 * self.model.scale:
            raise ValueError(f"validation_size must be at least 2·scale = {2 * self.model.scale}, not {self.validation_size!r}")
        if self.validation_lr is not None and self.validation is None:
            raise ValueError("validation_lr needs validation, the folder of the HR images")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures must be 0 or more, not {self.temperatures}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), not {self.betas}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["model"] = self.model.to_dict()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """The inverse of `to_dict`."""
        return cls(**{**values, "model": NCSRConfig.from_dict(values["model"])})

    def learning_rate(self, base: float, step: int, steps: int) -> float:
        """The learning rate of `step` (from 0) of a stage of `steps`: base · gamma^(milestones passed)."""
        passed = sum(step >= (place * steps if place < 1 else place) for place in self.milestones)
        return base * self.gamma**passed


def _path(name: str, path: str | os.PathLike) -> str:
    """`path` as text, `~` expanded."""
    text = os.path.expanduser(os.fspath(path))
    if not text:
        raise ValueError(f"{name} must be a path, not an empty text")
    return text


# Differences between the published models: the paper's noise, batch and number of steps.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ncsr-x4": {"max_std": 0.05, "steps": 220_000},
    "ncsr-x8": {"max_std": 0.03, "steps": 250_000},
    "srflow-x4": {"max_std": 0.0, "batch": 12, "lr": 2.5e-4, "steps": 200_000},
    "srflow-x8": {"max_std": 0.0, "batch": 16, "lr": 5e-4, "steps": 200_000},
    "ncsr-compact-x4": {
        "max_std": 0.05, "batch": 16, "crop": 96, "encoder_steps": 2000, "steps": 3600, "encoder_lr": 1e-3, "lr": 7e-4,
        "validate_every": 500, "save_every": 250, "workers": 1,
    },
}  # fmt: skip
