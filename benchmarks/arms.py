"""The arms that `end_to_end` compares, each an implementation with its options, and the pass that each makes in a task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast import NCSR, NCSRConfig, graphs
from ncsr_fast.engine import EngineOptions
from ncsr_fast.engine.ablation import Ablation, ablated
from ncsr_fast.flow.samples import ConditionedFlow

from .harness import differentiated, peak_bytes
from .published import OPTIONS

SCALE = OPTIONS["scale"]
PUBLISHED, ACCELERATED = "published", "published, accelerated"
COMPILED, OURS, CONDITIONED = "plain, torch.compile", "ncsr_fast", "ncsr_fast, conditioned once"


_ALL_PARTS, _NO_PART = Ablation(), Ablation(False, False, False)


class Variant(NamedTuple):
    """How the model is evaluated in an arm: by options, and by parts of the engine that are on or off."""

    options: EngineOptions
    ablation: Ablation = _ALL_PARTS


_BARE = EngineOptions(backend="reference", checkpoint=False)
_FUSED = EngineOptions(checkpoint=False)
LADDER = {
    "plain": Variant(EngineOptions(engine="plain", backend="reference")),
    "+ hoisting": Variant(_BARE, _NO_PART),
    "+ sub-pixel": Variant(_BARE, _NO_PART._replace(subpixel=True)),
    "+ channels-last": Variant(_BARE, Ablation(winograd=False)),
    "+ fused operators": Variant(_FUSED, Ablation(winograd=False)),
    "+ winograd": Variant(_FUSED),
    OURS: Variant(EngineOptions()),  # + checkpointing
    "ncsr_fast, tf32": Variant(EngineOptions(precision="tf32")),
    "ncsr_fast, bf16": Variant(EngineOptions(precision="bf16")),
}
CAPTURED = {f"captured, {precision}": EngineOptions(precision=precision) for precision in ("fp32", "tf32", "bf16")}


@dataclass(frozen=True)
class Task:
    """A job on `batch` LR images of side `lr_size`.

    `n` samples of them; or with `decode` forward and backward of decoding, with respect to the latents alone; or else forward
    and backward of the training loss.
    """

    name: str
    batch: int
    lr_size: int
    n: int = 0
    frozen_encoder: bool = False
    decode: bool = False

    def describe(self) -> str:
        if self.n:
            return f"{self.n} samples, LR {self.lr_size}×{self.lr_size}"
        if self.decode:
            return f"decoding and the gradient of its latents, LR {self.lr_size}×{self.lr_size}"
        side = self.lr_size * SCALE
        return f"training step, batch {self.batch} of {side}×{side}" + (", encoder frozen" if self.frozen_encoder else "")

    def can_be_done_by(self, name: str) -> bool:
        """True if the arm of this name has a pass of its own for the task."""
        return name not in CAPTURED if self.decode else name != CONDITIONED


def random_model(
    device: str, config: NCSRConfig | None = None, deviation: float = 3e-3, images: tuple[Tensor, Tensor] | None = None
) -> NCSR:
    """A model, the ×4 one by default, with parameters moved gently off their initial values and actnorms initialised.

    Args:
        device: The model's.
        config: The architecture.
        deviation: Standard deviation of what parameters are moved by.
        images: HR and LR images that the actnorms are initialised with; None draws RGB images for a ×4 model.
    """
    torch.manual_seed(0)
    model = NCSR(config or NCSRConfig.from_published(OPTIONS)).eval()
    with torch.no_grad():
        for parameter in model.levels.parameters():
            parameter += deviation * torch.randn_like(parameter)
    model.initialize(*(images or (torch.rand(2, 3, 64, 64), torch.rand(2, 3, 16, 16))))
    return model.to(device)


def draw_latents(task: Task, model: NCSR, device: str) -> list[Tensor]:
    """Latents of temperature 0.9, the same every time."""
    shapes, generator = model.latent_shapes(task.lr_size, task.lr_size), torch.Generator().manual_seed(2)
    return [(0.9 * torch.randn(task.batch, *shape, generator=generator)).to(device) for shape in shapes]


def backward(nll: Tensor, parameters: list[Tensor]) -> Tensor:
    """Gradients of the mean, in place of those there were; the mean."""
    for parameter in parameters:
        parameter.grad = None
    loss = nll.mean()
    loss.backward()
    return loss.detach()


class Arm:
    """One implementation doing one task."""

    def __init__(self, model: Any, task: Task, device: str, latents: list[Tensor]) -> None:
        self.model, self.task, self.latents = model, task, latents
        generator = torch.Generator().manual_seed(1)
        side = task.lr_size * SCALE
        self.lr = torch.rand(task.batch, 3, task.lr_size, task.lr_size, generator=generator).to(device)
        self.hr = torch.rand(task.batch, 3, side, side, generator=generator).to(device)
        self.noise = 0.03 * torch.randn(task.batch, 3, side, side, generator=generator).to(device)

    def prepare(self) -> None:
        """Record the gradients that the task is about, and no others."""
        self.model.train_flow(not self.task.decode)
        self.model.train_encoder(not self.task.decode and not self.task.frozen_encoder)

    def run(self) -> None:
        """Make the pass that is timed."""
        if self.task.decode:
            self.model.decode_and_differentiate(self.latents, self.lr)
        elif self.task.n:
            with torch.no_grad():
                self.model.sample(self.lr, n=self.task.n, temperature=0.9)
        else:
            self.model.loss_and_gradients(self.hr, self.lr, self.noise)

    def peak_bytes(self, device: str) -> int:
        """Most memory beyond the weights and their gradients, which are there before."""
        if self.task.n or self.task.decode:
            return peak_bytes(self.run, device)
        for parameter in self.model.parameters():
            parameter.grad = None
        peak = peak_bytes(self.run, device)
        return peak - sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)

    def results(self) -> dict[str, Tensor]:
        """Results in which arms must agree.

        Decoded images; with the gradient of the latents, as one vector; or the loss, and the gradients of all parameters.
        """
        if self.task.decode:
            images, gradient = self.model.decode_and_differentiate(self.latents, self.lr)
            return {"images": images, "gradient": gradient}
        if self.task.n:
            with torch.no_grad():
                return {"images": self.model.decode(self.latents, self.lr)}
        loss = self.model.loss_and_gradients(self.hr, self.lr, self.noise)
        return {"loss": loss, "gradient": self.model.gradient()}


class Ours:
    """NCSR with the options of an arm, and with parts of the engine off; arms share the weights."""

    def __init__(self, model: NCSR, options: EngineOptions, ablation: Ablation = _ALL_PARTS, compiled: bool = False) -> None:
        self.network, self.options, self.ablation = model, options, ablation
        self._nll = torch.compile(model.nll, dynamic=False) if compiled else model.nll
        self._decode = torch.compile(model.decode, dynamic=False) if compiled else None

    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    def train_encoder(self, wanted: bool) -> None:
        head = {id(parameter) for module in self.network.encoder.head() for parameter in module.parameters()}
        for parameter in self.network.encoder.parameters():
            parameter.requires_grad_(wanted and id(parameter) not in head)

    def train_flow(self, wanted: bool) -> None:
        self.network.levels.requires_grad_(wanted)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the options and the switches are in force."""
        self.network.options = self.options
        with ablated(**self.ablation._asdict()):
            yield

    def gradient(self) -> Tensor:
        """As one vector."""
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters()])

    @torch.no_grad()
    def round_trip(self, arm: Arm) -> float:
        """Largest error of decoding what was encoded, in units of the image's range."""
        with self.at_work():
            latents = self.network.encode(arm.hr, arm.lr, arm.noise).latents
            return float((self.network.decode(latents, arm.lr, arm.noise) - arm.hr).abs().max())

    def loss_and_gradients(self, hr: Tensor, lr: Tensor, noise: Tensor) -> Tensor:
        with self.at_work():
            return backward(self._nll(hr, lr, noise), self.parameters())

    def decode(self, latents: list[Tensor], lr: Tensor) -> Tensor:
        with self.at_work():
            return self._decode(latents, lr) if self._decode else self.network.decode(latents, lr)

    def decode_and_differentiate(self, latents: list[Tensor], lr: Tensor) -> tuple[Tensor, Tensor]:
        with self.at_work():
            return differentiated(lambda leaves: self.decode(leaves, lr), latents)

    def sample(self, lr: Tensor, n: int, temperature: float) -> Tensor:
        if self._decode is None:
            with self.at_work():
                return self.network.sample(lr, n=n, temperature=temperature)
        shapes = self.network.latent_shapes(*lr.shape[2:])  # what compiles is the decoding, encoder included
        draws = [[temperature * torch.randn(1, *shape, device=lr.device) for shape in shapes] for _ in range(n)]
        return torch.stack([self.decode(latents, lr) for latents in draws])


class Conditioned(Ours):
    """NCSR conditioned on an LR image at the first call, as for a solver of an inverse problem: what is timed is the flow."""

    def __init__(self, model: NCSR, options: EngineOptions) -> None:
        super().__init__(model, options)
        self._conditioned: tuple[Tensor, EngineOptions, ConditionedFlow] | None = None

    def decode(self, latents: list[Tensor], lr: Tensor) -> Tensor:
        with self.at_work():
            known = self._conditioned
            if known is None or known[0] is not lr or known[1] != self.options:
                with torch.no_grad():
                    known = self._conditioned = lr, self.options, self.network.condition(lr)
            return known[2].decode(latents)


class Captured(Ours):
    """NCSR whose training steps and samples are replays of CUDA graphs."""

    def sample(self, lr: Tensor, n: int, temperature: float) -> Tensor:
        with self.at_work():
            if not hasattr(self, "_sampler"):
                self._sampler = graphs.Sampler(self.network, n)
            return self._sampler(lr, temperature)[0]

    def loss_and_gradients(self, hr: Tensor, lr: Tensor, noise: Tensor) -> Tensor:
        with self.at_work():
            if not hasattr(self, "_step"):
                self._step = graphs.TrainingStep(self.network, None)
            return self._step(hr, lr, noise)[0]
