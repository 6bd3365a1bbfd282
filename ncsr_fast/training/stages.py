"""The two stages of training: optimised parameters, loss, and validation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ncsr_fast.data.perturb import perturb
from ncsr_fast.metrics.fidelity import psnr, to_uint8
from ncsr_fast.model import NCSR
from ncsr_fast.training.batch import Draws, prepare, residual
from ncsr_fast.training.diagnose import first_nonfinite
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.watch import health, sample_metrics


class Stage(Protocol):
    """Interface of a stage for the training loop."""

    name: str
    steps: int
    parts: tuple[str, ...]  # names of the values that `objective` returns
    objective: nn.Module  # (hr, lr, *draws) → `parts`, the first of which is minimised

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer from the first step on, with their learning rates."""

    def phase(self, step: int) -> int:
        """A number that changes when other parameters are trained."""

    def begin_phase(self, phase: int) -> None:
        """Make the parameters of `phase` trainable."""

    def initialize(self, hr: Tensor, lr: Tensor | None, draws: Draws) -> None:
        """Initialise the model from the first batch of all processes, when a stage starts but not when it is resumed."""

    def diagnose(self, *inputs: Tensor | None) -> str | None:
        """The first tensor that is not finite in a step on these inputs; None if all are finite."""

    def validate(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[dict[str, float], list[Tensor]]:
        """Metrics of one image (1, 3, sH, sW), and images (3, sH, sW) to show."""

    def examine(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Metrics that are computed for one image only, because they take long."""


class EncoderStage:
    """Pre-train the RRDB encoder as a generator: `loss = mean |encoder(lr) - hr|` (SRFlow's first stage)."""

    name, parts = "encoder", ("loss",)

    def __init__(self, model: NCSR, settings: TrainSettings) -> None:
        self.model, self.settings, self.steps = model, settings, settings.encoder_steps
        self.objective = EncoderObjective(model, settings)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.encoder.parameters()), "lr": self.settings.encoder_lr}]

    def phase(self, step: int) -> int:
        return 0

    def begin_phase(self, phase: int) -> None:
        self.model.encoder.requires_grad_(True)

    def initialize(self, hr: Tensor, lr: Tensor | None, draws: Draws) -> None:
        pass  # nothing depends on the data

    def diagnose(self, *inputs: Tensor | None) -> str | None:
        return first_nonfinite(self.model, self.objective, inputs)

    def validate(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[dict[str, float], list[Tensor]]:
        sr = self.model.encoder(lr).clamp(0, 1)
        return {"l1": float((sr - hr).abs().mean()), "psnr": float(psnr(to_uint8(sr, self.settings.to_8bit), hr))}, [sr[0]]

    def examine(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> dict[str, float]:
        return {}


class EncoderObjective(nn.Module):
    """mean |encoder(lr) - hr|, a tensor (1,)."""

    def __init__(self, model: NCSR, settings: TrainSettings) -> None:
        super().__init__()
        self.encoder, self.settings = model.encoder, settings

    def forward(self, hr: Tensor, lr: Tensor | None, *draws: Tensor) -> Tensor:
        batch = prepare(hr, lr, Draws(*draws), self.settings)
        return (self.encoder(batch.lr) - batch.hr).abs().mean()[None]


class FlowStage:
    """Train the flow, and from `unfreeze` on the encoder with it: see `FlowObjective`."""

    name = "flow"

    def __init__(self, model: NCSR, settings: TrainSettings) -> None:
        self.model, self.settings, self.steps = model, settings, settings.steps
        self.objective = FlowObjective(model, settings)
        self.parts = ("loss", "nll", "l1") if settings.l1_weight else ("loss", "nll")
        # Parameters of the encoder that the flow uses; its HR part has no gradient here.
        unused = {id(parameter) for module in model.encoder.head() for parameter in module.parameters()}
        self._encoder = [parameter for parameter in model.encoder.parameters() if id(parameter) not in unused]
        model.encoder.requires_grad_(False)

    def groups(self) -> list[dict[str, Any]]:
        settings = self.settings
        unfrozen_lr = settings.lr if settings.unfrozen_lr is None else settings.unfrozen_lr
        return [
            {"params": list(self.model.levels.parameters()), "lr": settings.lr},
            {"params": self._encoder, "lr": unfrozen_lr},
        ]

    def phase(self, step: int) -> int:
        return int(step >= self.settings.unfreeze * self.steps)

    def begin_phase(self, phase: int) -> None:
        for parameter in self._encoder:
            parameter.requires_grad_(bool(phase))

    def initialize(self, hr: Tensor, lr: Tensor | None, draws: Draws) -> None:
        if self.settings.start_from is None:
            batch = prepare(hr, lr, draws, self.settings)
            self.model.initialize(batch.noisy_target, batch.noisy_lr, batch.noise)

    def diagnose(self, *inputs: Tensor | None) -> str | None:
        hr, lr, *draws = inputs
        return first_nonfinite(self.model, self.objective, inputs, prepare(hr, lr, Draws(*draws), self.settings))

    def validate(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[dict[str, float], list[Tensor]]:
        settings, channels = self.settings, self.model.config.noise_channels
        options = {"noise_channels": channels, "fixed_std": settings.fixed_std, "lr_noise": settings.lr_noise}
        noisy = perturb(residual(hr, lr, settings), lr, settings.max_std, generator, **options)
        metrics, images = {"nll": float(self.model.nll(*noisy))}, []
        for temperature in self.settings.temperatures:
            found, sr = sample_metrics(self.model, hr, lr, temperature, generator, self.settings.to_8bit)
            metrics |= {f"{name}@{temperature:g}": value for name, value in found.items()}
            images.append(sr)
        return metrics, images

    def examine(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> dict[str, float]:
        return health(self.model, lr, max(self.settings.temperatures, default=0.0), generator)


class FlowObjective(nn.Module):
    """`nll_weight · mean nll(hr + v, lr + v_lr; v) + l1_weight · mean |decode(0, lr + v_lr; v) - hr|` (Kim & Son 2021).

    For hr stands its residual where the flow is one of residuals, and for 0 the mean of the prior where it has one.

    Returns the sum, the mean NLL in bits per pixel position and, if its weight is not 0, the mean L1 error.
    """

    def __init__(self, model: NCSR, settings: TrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self._has_prior = model.flow.prior == "encoder"

    def forward(self, hr: Tensor, lr: Tensor | None, *draws: Tensor) -> Tensor:
        draws = Draws(*draws)
        batch = prepare(hr, lr, draws, self.settings)
        prior = draws.reference if self._has_prior else "condition"
        nll = self.model(batch.noisy_target, batch.noisy_lr, batch.noise, prior=prior).mean()
        loss = self.settings.nll_weight * nll
        if not self.settings.l1_weight:
            return torch.stack([loss, nll])
        shapes = self.model.latent_shapes(*batch.lr.shape[2:])
        latents = [batch.lr.new_zeros(len(batch.lr), *shape) for shape in shapes]
        if self._has_prior:
            latents[-1] = self.model.features(self.model.padded(batch.noisy_lr)).prior_mean
        l1 = (self.model.decode(latents, batch.noisy_lr, batch.noise) - batch.target).abs().mean()
        return torch.stack([loss + self.settings.l1_weight * l1, nll, l1])
