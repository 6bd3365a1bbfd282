"""The two stages of training: what is optimised, the loss of a step, and how it is validated."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ncsr_fast.data.perturb import perturb
from ncsr_fast.metrics.fidelity import lr_psnr, psnr
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.training.settings import TrainSettings


class Stage(Protocol):
    """What the training loop needs to know of a stage."""

    name: str
    steps: int
    lr: float

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer holds, from the first step on."""

    def begin(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> None:
        """Called once, with the first batch, when a stage starts and not when it is resumed."""

    def loss(self, hr: Tensor, lr: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """The loss (a scalar) of a step."""

    def validate(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[dict[str, float], list[Tensor]]:
        """Metrics of one image (1, 3, sH, sW), and images (3, sH, sW) to look at."""


class EncoderStage:
    """Pre-train the RRDB encoder as a generator: `loss = mean |encoder(lr) - hr|` (SRFlow's first stage)."""

    name = "encoder"

    def __init__(self, model: NCSR, settings: TrainSettings) -> None:
        self.model, self.steps, self.lr = model, settings.encoder_steps, settings.encoder_lr
        model.encoder.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.encoder.parameters())

    def begin(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> None:
        pass  # nothing depends on the data

    def loss(self, hr: Tensor, lr: Tensor, step: int, generator: torch.Generator) -> Tensor:
        return (self.model.encoder(lr) - hr).abs().mean()

    def validate(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[dict[str, float], list[Tensor]]:
        sr = self.model.encoder(lr).clamp(0, 1)
        return {"l1": float((sr - hr).abs().mean()), "psnr": float(psnr(sr, hr))}, [sr[0]]


class FlowStage:
    """Train the flow by `loss = mean nll(hr + v, lr + v_lr; v)` (Kim & Son 2021), in bits per pixel.

    With `l1_weight`, plus that weight times `mean |decode(0, lr + v_lr; v) - hr|`, as the published program does.
    """

    name = "flow"

    def __init__(self, model: NCSR, settings: TrainSettings) -> None:
        self.model, self.settings, self.steps, self.lr = model, settings, settings.steps, settings.lr
        # What the flow uses of the encoder: its HR end has no gradient here.
        unused = {id(parameter) for module in model.encoder.head() for parameter in module.parameters()}
        self._encoder = [parameter for parameter in model.encoder.parameters() if id(parameter) not in unused]
        model.encoder.requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.levels.parameters(), *self._encoder]

    def begin(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> None:
        if self.settings.start_from is None:
            self.model.initialize(*self._perturbed(hr, lr, generator))

    def loss(self, hr: Tensor, lr: Tensor, step: int, generator: torch.Generator) -> Tensor:
        trained = step >= self.settings.unfreeze * self.steps
        for parameter in self._encoder:
            parameter.requires_grad_(trained)
        noisy_hr, noisy_lr, noise = self._perturbed(hr, lr, generator)
        loss = self.model.nll(noisy_hr, noisy_lr, noise).mean()
        if self.settings.l1_weight:
            shapes = self.model.latent_shapes(*lr.shape[2:])
            likely = self.model.decode([lr.new_zeros(len(lr), *shape) for shape in shapes], noisy_lr, noise)
            loss = loss + self.settings.l1_weight * (likely - hr).abs().mean()
        return loss

    def validate(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[dict[str, float], list[Tensor]]:
        metrics = {"nll": float(self.model.nll(*self._perturbed(hr, lr, generator)))}
        images = []
        for temperature in self.settings.temperatures:
            # overflow shows in the metrics
            sr = self.model.sample(lr, n=1, temperature=temperature, generator=generator, on_nonfinite="ignore")[:, 0]
            metrics[f"psnr@{temperature:g}"] = float(psnr(sr, hr))
            metrics[f"lr_psnr@{temperature:g}"] = float(lr_psnr(sr, lr, self.model.config.scale))
            images.append(sr[0])
        return metrics, images

    def _perturbed(self, hr: Tensor, lr: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        channels = self.model.config.noise_channels
        hr, lr, noise = perturb(hr, lr, self.settings.max_std, generator, noise_channels=channels)
        return hr, lr, noise if channels else None
