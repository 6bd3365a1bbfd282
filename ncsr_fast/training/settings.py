"""Everything that decides a training run; stored with it, and compared when it is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ncsr_fast.config import NCSRConfig


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the two stages: the encoder by L1 (SRFlow's generator pre-training), then the flow by NLL.

    images             folder of HR training images; lr_images the folder of their LR counterparts, None to compute
                       them by MATLAB bicubic
    validation         folder of HR images to validate on, None to look at training images instead
    crop, batch        side of an HR crop, and crops a step
    encoder_steps      steps of the first stage; 0 skips it (give `encoder_weights`)
    encoder_weights    what the encoder starts from: a published RRDB or ESRGAN file, or RUN/encoder of another run
    steps              steps of the second stage
    start_from         model directory, published .pth or shipped name whose weights, actnorms included, both stages start
                       from, to fine-tune it; None for random weights and data-dependent actnorms
    encoder_lr, lr     Adam's learning rates of the stages
    milestones, gamma  fractions of a stage at which its learning rate is multiplied by gamma
    betas              of Adam, as the paper configures them
    max_std            M of NCSR's noise, c ~ U(0, M)
    l1_weight          weight of `mean |temperature-0 sample - hr|` beside the NLL (the published `weight_l1`), 0 for none
    unfreeze           fraction of the second stage after which the encoder is trained too (1: never)
    max_grad_norm      gradients are clipped to this norm
    seed               of weights, crops and noise
    log_every, validate_every, save_every   in steps
    validation_images  how many of the validation folder are used
    temperatures       of the samples drawn at each validation
    """

    config: NCSRConfig
    images: str
    lr_images: str | None = None
    validation: str | None = None
    crop: int = 160
    batch: int = 18
    encoder_steps: int = 200_000
    encoder_weights: str | None = None
    steps: int = 220_000
    start_from: str | None = None
    encoder_lr: float = 2e-4
    lr: float = 2e-4
    milestones: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    gamma: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    max_std: float = 0.05
    l1_weight: float = 0.0
    unfreeze: float = 0.5
    max_grad_norm: float = 100.0
    seed: int = 0
    log_every: int = 20
    validate_every: int = 1000
    save_every: int = 1000
    validation_images: int = 8
    temperatures: tuple[float, ...] = (0.0, 0.8)

    def __post_init__(self) -> None:
        for name in ("batch", "log_every", "validate_every", "save_every", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        for name in ("encoder_steps", "steps", "max_std", "l1_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)!r}")
        for name in ("encoder_lr", "lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")
        for name in ("milestones", "betas", "temperatures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["config"] = self.config.to_dict()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """The inverse of `to_dict`."""
        return cls(**{**values, "config": NCSRConfig.from_dict(values["config"])})

    def learning_rate(self, base: float, step: int, steps: int) -> float:
        """The learning rate of `step` (from 0) of a stage of `steps`: base · gamma^(milestones passed)."""
        return base * self.gamma ** sum(step >= fraction * steps for fraction in self.milestones)


# What differs between the published models: the paper's noise, batch and number of steps.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ncsr-x4": {"max_std": 0.05, "steps": 220_000},
    "ncsr-x8": {"max_std": 0.03, "steps": 250_000},
    "srflow-x4": {"max_std": 0.0, "batch": 12, "lr": 2.5e-4, "steps": 200_000},
    "srflow-x8": {"max_std": 0.0, "batch": 16, "lr": 5e-4, "steps": 200_000},
    "ncsr-compact-x4": {
        "max_std": 0.05, "batch": 16, "crop": 96, "encoder_steps": 2000, "steps": 3600, "encoder_lr": 1e-3, "lr": 7e-4,
        "validate_every": 500, "save_every": 250,
    },
}  # fmt: skip
