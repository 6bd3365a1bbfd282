"""The origin of a loss or a gradient that is not finite: level, step and tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ncsr_fast.engine.plain import PlainLevel
from ncsr_fast.flow.level import FlowLevel
from ncsr_fast.model import NCSR
from ncsr_fast.training.batch import Batch

_FLAT = 0.95  # share of pixels equal to their neighbours; below half in photographs, even of a clear sky


def first_nonfinite(
    model: NCSR, objective: nn.Module, inputs: tuple[Tensor | None, ...], batch: Batch | None = None
) -> str | None:
    """The first tensor that is not finite in a step of `objective` on `inputs` with the present weights; None if all are.

    The order is that of computation: weights, the likelihood of `batch` if given, the loss, gradients from the last to the
    first. The search is slow, waits for the device, and drops existing gradients.
    """
    with torch.no_grad():
        found = _in_weights(model) or (_in_likelihood(model, batch) if batch is not None else None)
    if found is None:
        found = _in_gradients(model, objective(*inputs))
    model.zero_grad()
    return found


def _in_weights(model: NCSR) -> str | None:
    for name, weight in model.named_parameters():
        if not _finite(weight):
            return f"weight {_place(model, name, weight)}"
    return None


def _in_likelihood(model: NCSR, batch: Batch) -> str | None:
    z = batch.noisy_target
    condition = model.features(batch.noisy_lr, plain=True)
    for index, (level, features) in enumerate(zip(model.levels, condition.features)):
        plain = PlainLevel(level, features, model.options)
        u, noise = plain.u, plain.noise(batch.noise, z)
        if not _finite(u):
            return f"the encoder's features for level {index + 1}"
        z = level.squeezed(z)
        for number, step in enumerate(level.unbind()):
            for part in level.encode_parts(step, z, u, noise):
                for what, tensor in (("network of", part.h), ("state after", part.z), ("log-determinant of", part.logdet)):
                    if tensor is not None and not _finite(tensor):
                        return f"level {index + 1}, {_step(level, number)}: {what} the {part.name}"
                z = part.z
        if level.split_channels:
            z = z[:, : -level.split_channels]
    return None


def _in_gradients(model: NCSR, parts: Tensor) -> str | None:
    if not _finite(parts):
        return f"the loss, {parts.tolist()}"
    model.zero_grad()
    parts[0].backward()
    bad = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if bad:
        name, gradient = bad[-1]  # the backward pass reaches the last level first
        return f"gradient of {_place(model, name, gradient, last=True)}"
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    if not _finite(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)):
        name = max(largest, key=largest.get)
        return f"the norm of the gradient, which overflows; its largest value, {largest[name]:.3g}, is of {name}"
    return None


def without_texture(images: Tensor) -> Tensor:
    """For uint8 images (B, C, H, W), a bool (B,): True if nearly all pixels equal their neighbours along an axis.

    Without noise such images have no density, and the likelihood of a flow that is trained on them grows without bound.
    """
    pairs = ((images[..., 1:], images[..., :-1]), (images[..., 1:, :], images[..., :-1, :]))
    shares = [(first == second).all(dim=1).float().mean(dim=(1, 2)) for first, second in pairs]
    return torch.maximum(*shares) > _FLAT


def _place(model: NCSR, name: str, tensor: Tensor, last: bool = False) -> str:
    """The name of a parameter; in a level also the level and its first or last step that is not finite."""
    kind, index, *rest = name.split(".")
    if kind != "levels" or rest[0].startswith("split"):
        return name
    level = model.levels[int(index)]
    bad = (~tensor.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    count = level.transition_steps + level.steps
    number = (
        bad[-1 if last else 0] + count - len(tensor)
    )  # networks exist in no transition step, and noise networks only in the last steps
    return f"{'.'.join(rest)} of level {int(index) + 1}, {_step(level, number)}"


def _step(level: FlowLevel, number: int) -> str:
    """The name of a level's step, given its number among all steps; `Origin` and `InvertibilityReport` count likewise."""
    step = number - level.transition_steps
    return f"step {step}" if step >= 0 else f"transition step {number}"


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
