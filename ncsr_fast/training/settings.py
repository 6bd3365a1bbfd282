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
from ncsr_fast.metrics.fidelity import check_to_8bit
from ncsr_fast.systems import DEEP_STD

_AT_LEAST_ONE = (
    "batch", "log_every", "validate_every", "save_every", "keep", "validation_images", "validation_size", "max_skipped",
)  # fmt: skip
_NOT_NEGATIVE = (
    "encoder_steps", "steps", "warmup", "max_std", "nll_weight", "l1_weight", "unfreeze", "weight_decay", "workers",
    "cache_gib",
)  # fmt: skip
_FINITE = ("milestones", "temperatures", "betas")
_PLACES = ("images", "lr_images", "validation", "validation_lr", "start_from", "encoder_weights")
_POSITIVE = ("encoder_lr", "lr", "unfrozen_lr", "max_grad_norm", "gamma", "backoff")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the two stages: the encoder by L1 (SRFlow's generator pre-training), then the flow by its likelihood.

    What is trained
    model              its architecture
    start_from         model directory, published .pth or shipped name whose weights, actnorms included, both stages start
                       from, to fine-tune it; None for random weights and data-dependent actnorms
    encoder_weights    what the encoder starts from: a published RRDB or ESRGAN file, or RUN/encoder of another run. Its long
                       skip starts at the last block whatever it is: of an ESRGAN generator, whose skip starts at the first
                       convolution, the weights are a start and not the same pictures

    Data (relative paths begin at the current folder, also those of a YAML; ~ is the home folder, patterns are not expanded)
    images             folders of HR images, subfolders included, and published .pklv4 files, taken together
    lr_images          LR counterparts, one for each of `images`; () to degrade the crops
    degradation        "bicubic" (MATLAB's), or the "module:function" of one's own (`ncsr_fast.data.degradation`)
    validation         folder of HR images to validate on, None to look at training images instead; validation_lr their LR
                       images, None to degrade them
    Of low-light models `images` and `validation` are the bright photographs, `lr_images` and `validation_lr` the dark ones, as
    large and of the same names
    crop, batch        side of an HR crop, and crops a step, over all processes together
    flip, rotate       crops are mirrored, and turned by a multiple of 90°, at random
    workers            processes that read images, for each training process; 0 reads them between steps
    cache_gib          decoded images are kept on disk in RUN/cache, at most so many GiB of them, while the run lasts

    The encoder's stage
    encoder_steps      0 skips it
    encoder_lr         its learning rate

    The flow's stage
    steps, lr          how long, and Adam's learning rate
    unfreeze           fraction of the stage after which the encoder is trained too (0: from the start, 1: never)
    unfrozen_lr        the encoder's learning rate then, None for `lr`
    max_std            M of NCSR's noise, c ~ U(0, M)
    fixed_std          c is M for every image (SRFlow-DA)
    lr_noise           the LR image gets the noise too, downsampled
    reference_prior    of low-light models: the share of the batches in which the mean of the prior is the reference's (LLFlow's
                       `train_gt_ratio`), drawn for each step
    nll_weight, l1_weight   loss = nll_weight · NLL + l1_weight · mean |temperature-0 sample - hr| (published `weight_fl`,
                       `weight_l1`)

    Both stages
    warmup             steps in which the learning rate rises from 0
    milestones, gamma  where the learning rate is multiplied by gamma: steps, or below 1 fractions of a stage
    betas, weight_decay  of Adam
    max_grad_norm      gradients are clipped to this norm, None for never
    max_skipped        a step whose loss or gradient is not finite is skipped; so many in a row end the run
    backoff            the learning rate is multiplied by it at each skipped step (1: never)
    seed               of weights, crops and noise

    How it is computed (none of it but precision changes a result by more than rounding)
    precision          of the networks: "fp32", "tf32", "bf16"
    checkpoint         recompute hidden layers of the small networks in the backward pass instead of saving them
    graph              steps as CUDA graphs; None: on a GPU, where one process trains

    What is seen and kept
    log_every, validate_every, save_every   in steps
    keep               checkpoints kept of each stage
    validation_images  how many of the validation folder are used, each cut to its middle of validation_size pixels a side
    temperatures       of the samples drawn at each validation
    to_8bit            how their floats become 8 bits: "round", or "truncate" as in the published test programs
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
    fixed_std: bool = False
    lr_noise: bool = True
    reference_prior: float = 0.0
    nll_weight: float = 1.0
    l1_weight: float = 0.0
    warmup: int = 0
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
    to_8bit: str = "round"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "lr_images", "milestones", "betas", "temperatures"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, (str, os.PathLike)) else tuple(value))
        for name in _PLACES:
            value = getattr(self, name)
            paths = tuple(_path(name, path) for path in (value if isinstance(value, tuple) else (value,)) if path is not None)
            object.__setattr__(self, name, paths if isinstance(value, tuple) else next(iter(paths), None))
        if self.model.traits.channels != 3:
            raise ValueError(f"model must be of RGB images: the trainer has no {self.model.traits.title}")
        if not self.images:
            raise ValueError("images must name at least one folder of HR images or .pklv4 file")
        if self.lr_images and len(self.lr_images) != len(self.images):
            raise ValueError(f"lr_images must name one place for each of the {len(self.images)} of images: {self.lr_images}")
        if self.lr_images and self.degradation != "bicubic":
            raise ValueError("degradation makes LR images, but lr_images names LR images too: give one of the two")
        self._check_low_light()
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
        check_to_8bit(self.to_8bit)
        if self.backoff > 1:
            raise ValueError(f"backoff must be at most 1, not {self.backoff!r}")
        unit = f"{self.model.traits.lr_multiple}·scale = {self.crop_unit}"
        if self.crop < 1 or self.crop % self.crop_unit:
            raise ValueError(f"crop must be a positive multiple of {unit}, not {self.crop!r}")
        if self.validation_size < self.crop_unit:
            raise ValueError(f"validation_size must be at least {unit}, not {self.validation_size!r}")
        if self.validation_lr is not None and self.validation is None:
            raise ValueError("validation_lr needs validation, the folder of the HR images")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures must be 0 or more, not {self.temperatures}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), not {self.betas}")

    def _check_low_light(self) -> None:
        if not 0 <= self.reference_prior <= 1:
            raise ValueError(f"reference_prior must be a share from 0 to 1, not {self.reference_prior!r}")
        title = self.model.traits.title
        if not self.is_low_light:
            if self.reference_prior:
                raise ValueError(f"reference_prior must be 0: the prior of {title} has no mean, not {self.reference_prior!r}")
            return
        if self.encoder_steps:
            raise ValueError(f"encoder_steps must be 0: the encoder of {title} makes no image, not {self.encoder_steps!r}")
        if self.encoder_weights is not None:
            raise ValueError(f"encoder_weights must be left out: they are of RRDB networks, which {title} has none of")
        if self.lr_noise:
            raise ValueError(f"lr_noise must be false: the input of {title} is no image that noise is added to")
        for name, dark, given in (("lr_images", self.lr_images, True), ("validation_lr", self.validation_lr, self.validation)):
            if given and not dark:
                of = "images" if name == "lr_images" else "validation"
                raise ValueError(f"{name} must name the dark images of {of}, which {title} is trained on in pairs")

    @property
    def is_low_light(self) -> bool:
        """True for models that read dark photographs and their equalized histogram."""
        return self.model.traits.encoder == "low light"

    @property
    def crop_unit(self) -> int:
        """HR pixels that the sides of crops are multiples of, so that nothing is padded."""
        return self.model.traits.lr_multiple * self.model.scale

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
        """The learning rate of `step` (from 0) of a stage of `steps`: base · gamma^(milestones passed), and of the warm-up."""
        passed = sum(step >= (place * steps if place < 1 else place) for place in self.milestones)
        return base * self.gamma**passed * min(1.0, (step + 1) / max(self.warmup, 1))


def _path(name: str, path: str | os.PathLike) -> str:
    """`path` as text, `~` expanded."""
    text = os.path.expanduser(os.fspath(path))
    if not text:
        raise ValueError(f"{name} must be a path, not an empty text")
    return text


# JSON-ready values, of the settings that have one
DEFAULTS = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for field in dataclasses.fields(TrainSettings)
    if field.default is not dataclasses.MISSING
}
_DEEP = {"max_std": DEEP_STD, "fixed_std": True, "lr_noise": False, "steps": 200_000}
_LOW_LIGHT = {
    "max_std": 0.0, "lr_noise": False, "reference_prior": 0.2, "encoder_steps": 0, "unfreeze": 0.0, "batch": 16, "lr": 5e-4,
    "rotate": False,
}  # fmt: skip

# Differences between the published models: the paper's noise, batch and number of steps.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ncsr-x4": {"max_std": 0.05, "steps": 220_000},
    "ncsr-x8": {"max_std": 0.03, "steps": 250_000},
    "srflow-x4": {"max_std": 0.0, "batch": 12, "lr": 2.5e-4, "steps": 200_000},
    "srflow-x8": {"max_std": 0.0, "batch": 16, "lr": 5e-4, "steps": 200_000},
    "fs-ncsr-x4": {"max_std": 0.05, "batch": 16, "steps": 220_000},
    "fs-ncsr-x8": {"max_std": 0.03, "batch": 16, "steps": 250_000},
    **{f"srflow-da{variant}-x4": {**_DEEP, "batch": 12} for variant in ("", "-r", "-d", "-s")},
    **{f"srflow-da{variant}-x8": {**_DEEP, "batch": 16} for variant in ("", "-r", "-d", "-s")},
    "llflow-lol": {**_LOW_LIGHT, "steps": 40_000, "warmup": 3000},
    "llflow-lol-smallnet": {**_LOW_LIGHT, "steps": 45_000},
    "llflow-compact": {
        **_LOW_LIGHT, "batch": 8, "crop": 96, "steps": 4000, "lr": 1e-3, "max_std": 0.01, "fixed_std": True,
        "validate_every": 500, "save_every": 250, "workers": 1,
    },
    "ncsr-compact-x4": {
        "max_std": 0.05, "batch": 16, "crop": 96, "encoder_steps": 2000, "steps": 3600, "encoder_lr": 1e-3, "lr": 7e-4,
        "validate_every": 500, "save_every": 250, "workers": 1,
    },
}  # fmt: skip
