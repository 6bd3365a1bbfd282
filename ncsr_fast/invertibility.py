"""Report on how well a flow can be inverted: the divisors and the round-trip error of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ncsr_fast.engine.plain import PlainLevel
from ncsr_fast.flow.level import FlowLevel, Step
from ncsr_fast.flow.samples import around_prior_mean, draw_latents
from ncsr_fast.flow.walk import downward

if TYPE_CHECKING:
    from ncsr_fast.model import NCSR

HEALTHY_SCALE = 1e-2  # eight steps in a row with a smaller scale take a state of 1 beyond float32


@dataclass(frozen=True)
class StepReport:
    """Figures of one step, from decoding a sample."""

    level: int  # counted from the HR side, from 0
    step: int  # in encoding order, from 0; transition steps have negative numbers, -1 the last
    smallest_scale: float  # the smallest divisor of decoding the step
    of: str  # the map with that scale: "actnorm", "injector", "coupling" or "noise coupling"
    condition: float  # condition number of the 1×1 convolution, in the 2-norm
    round_trip: float  # largest |encode(decode(y)) - y| of the step, divided by the largest |y|
    largest_state: float  # largest |state| after decoding the step


@dataclass(frozen=True)
class InvertibilityReport:
    """Report of `NCSR.check_invertibility`; `print(report)` prints it as a table."""

    steps: tuple[StepReport, ...]  # in the order of decoding
    round_trip: float  # largest |decode(encode(hr)) - hr| of the decoded images

    @property
    def worst(self) -> StepReport:
        """The step with the smallest scale."""
        return min(self.steps, key=lambda step: step.smallest_scale)

    @property
    def first_unhealthy(self) -> StepReport | None:
        """The first decoded step with a scale below 0.01 or a state that is not finite; None if all steps are healthy.

        Steps decoded after it may be unhealthy because of it.
        """
        steps = (s for s in self.steps if s.smallest_scale < HEALTHY_SCALE or not math.isfinite(s.largest_state))
        return next(steps, None)

    @property
    def healthy(self) -> bool:
        """True if every scale is at least 0.01 and every state is finite."""
        return self.first_unhealthy is None

    def __str__(self) -> str:
        lines = ["level        step  smallest scale  of              condition  round trip  largest state"]
        for s in self.steps:
            step = s.step if s.step >= 0 else "transition"
            lines.append(
                f"{s.level + 1:5}  {step!s:>10}  {s.smallest_scale:14.2e}  {s.of:14}  {s.condition:9.1e}  {s.round_trip:10.1e}"
                f"  {s.largest_state:13.1e}"
            )
        first = self.first_unhealthy
        verdict = "healthy" if first is None else f"not healthy from level {first.level + 1}, step {first.step} on"
        return "\n".join([*lines, f"round trip of the images {self.round_trip:.1e}; {verdict}"])


@torch.no_grad()
def check_invertibility(model: NCSR, lr: Tensor, temperature: float, generator: torch.Generator | None) -> InvertibilityReport:
    """The report of `NCSR.check_invertibility` for an LR image of even size, by the reference, step by step."""
    drawn = draw_latents(model.latent_shapes(*lr.shape[2:]), len(lr), 1, temperature, lr, generator)
    condition = model.features(lr, plain=True)
    latents = [latent[:, 0] for latent in around_prior_mean(drawn, condition.prior_mean)]
    reports: list[StepReport] = []
    z = latents[-1]
    for index, level, latent in downward(model.levels, latents):
        plain = PlainLevel(level, condition.features[index], model.options)
        u, noise = plain.u, plain.noise(None, z)
        if latent is not None:
            z, _ = level.undo_split(z, latent)
        for number, step in reversed(list(enumerate(level.unbind()))):
            scale, of = _smallest_scale(level, step, z, u, noise)
            y, (z, _) = z, level.decode_step(step, z, u, noise)
            again, _ = level.encode_step(step, z, u, noise)
            reports.append(
                StepReport(
                    level=index,
                    step=number - level.transition_steps,
                    smallest_scale=scale,
                    of=of,
                    condition=float(torch.linalg.cond(step.weight.double())),
                    round_trip=float((again - y).abs().max() / y.abs().max()),
                    largest_state=float(z.abs().max()),
                )
            )
        z = level.unsqueezed(z)
    return InvertibilityReport(tuple(reports), _round_trip(model, z, lr))


def _smallest_scale(level: FlowLevel, step: Step, y: Tensor, u: Tensor, noise: Tensor | None) -> tuple[float, str]:
    """The smallest scale of a step, and the map that has it; y is the state after the step."""
    found = [(float(torch.exp(step.logs.min())), "actnorm")]
    for branch, network in step.branches:
        h = network(level.network_input(branch, y, u, noise))
        found.append((float(torch.sigmoid(h[:, 1::2] + 2).min() + level.eps), branch.label))
    return min(found)


def _round_trip(model: NCSR, hr: Tensor, lr: Tensor) -> float:
    """The largest round-trip error of decoded images; NaN when they are not finite."""
    if not hr.isfinite().all():
        return math.nan
    flow = model.condition(lr)
    return float((flow.decode(flow.encode(hr).latents) - hr).abs().max())
