"""Training steps and sampling passes as CUDA graphs: a replay is what the same code does without capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ncsr_fast import NCSR, graphs
from ncsr_fast.benchmarks.arms import Ours
from ncsr_fast.benchmarks.end_to_end import ALLOWED, ALLOWED_GRADIENT
from ncsr_fast.benchmarks.harness import rounded

from .session import Session

_STEPS = 3
_ALLOWED_LOSS = 1e-3  # after steps of Adam, which makes a step of any sign that rounding decides


def capture_step(session: Session) -> None:
    """Gradients, losses of a few steps with Adam, and an encoder that is frozen and thawed under a captured step."""
    model = session.model()
    train_encoder(model, True)
    batch = session.batch(2, session.sizes.check_lr)
    session.part("gradients", _gradients, session, model, batch)
    session.part("steps with Adam", _steps, session, model, batch)
    session.part("encoder frozen, then trained", _thawed_encoder, session, model, batch)


def capture_sampler(session: Session) -> None:
    """Samples; those of a frozen model; after it was unfrozen and its weights changed; frozen once more."""
    model = session.model()
    lr = session.random(1, 3, session.sizes.check_lr, session.sizes.check_lr)
    sampler = graphs.Sampler(model, session.sizes.samples, graph=session.capture)
    before = session.part("captured", _samples, session, model, sampler, lr)
    session.part("frozen", lambda: _samples(session, model.freeze_for_inference(), sampler, lr))
    session.part("unfrozen and changed", _samples_of_changed_weights, session, model, sampler, lr, before.get("mean"))
    session.part("frozen again", lambda: _samples(session, model.freeze_for_inference(), sampler, lr))


def capture_loader(session: Session) -> None:
    """A step captured while a loader with pinned memory reads ahead, and again for another batch shape."""
    session.part("pinned memory", _loader, session)


def train_encoder(model: NCSR, wanted: bool) -> None:
    """Gradients of the encoder on or off, but for its HR end, which has none."""
    Ours(model, model.options).train_encoder(wanted)


def _gradients(session: Session, model: NCSR, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    results = []
    for graph in (False, session.capture):
        step = graphs.TrainingStep(model, None, graph=graph)
        loss = step(*batch)[0]
        loss = step(*batch)[0]  # the second of a graph is a replay alone
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        results.append((loss.clone(), gradient))
        model.zero_grad()
    (loss, gradient), (found_loss, found) = results
    figures = {
        "loss": float((found_loss - loss).abs() / loss.abs()),
        "gradient": float((found - gradient).norm() / gradient.norm()),
    }
    return _within(figures, {"loss": ALLOWED["fp32"], "gradient": ALLOWED_GRADIENT["fp32"]})


def _steps(session: Session, model: NCSR, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for graph in (False, session.capture):
        model.load_state_dict(state)
        step = graphs.TrainingStep(model, graphs.adam(model, 2e-4), max_grad_norm=100.0, graph=graph)
        losses.append([float(step(*batch)[0]) for _ in range(_STEPS)])
        done, skipped = step.counters[:2].tolist()
        if (done, skipped) != (_STEPS, 0):
            raise ValueError(f"of {_STEPS} steps {done} were counted and {skipped} skipped")
    model.load_state_dict(state)
    eager, captured = losses
    errors = [abs(a - b) / abs(b) for a, b in zip(captured, eager)]
    return _within({"loss": max(errors)}, {"loss": _ALLOWED_LOSS}) | {"losses": captured}


def _thawed_encoder(session: Session, model: NCSR, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    """A step that was captured with a frozen encoder, whose parameters its optimizer has, then asked for their gradients."""
    parameters = list(model.encoder.body.parameters())
    train_encoder(model, False)
    step = graphs.TrainingStep(model, graphs.adam(list(model.parameters()), 0.0), graph=session.capture)
    step(*batch)
    if any(parameter.grad is not None for parameter in parameters):
        raise ValueError("a frozen encoder has gradients")
    train_encoder(model, True)
    step(*batch)
    missing = sum(parameter.grad is None for parameter in parameters)
    if missing:
        raise ValueError(f"{missing} of {len(parameters)} parameters of the thawed encoder have no gradient")
    found = torch.cat([parameter.grad.flatten() for parameter in parameters])
    graphs.TrainingStep(model, None, graph=False)(*batch)
    expected = torch.cat([parameter.grad.flatten() for parameter in parameters])
    error = float((found - expected).norm() / expected.norm())
    return _within({"gradient": error}, {"gradient": ALLOWED_GRADIENT["fp32"]})


def _samples(session: Session, model: NCSR, sampler: graphs.Sampler, lr: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        expected = model.sample(lr, sampler.n, 0.8, _generator(session), on_nonfinite="ignore")
    found = sampler(lr, 0.8, _generator(session))[0]
    error = float((found - expected).abs().max() / expected.abs().max())
    return _within({"images": error}, {"images": ALLOWED["fp32"]}) | {"mean": float(found.mean())}


def _samples_of_changed_weights(
    session: Session, model: NCSR, sampler: graphs.Sampler, lr: Tensor, before: float | None
) -> dict[str, Any]:
    model.unfreeze()
    with torch.no_grad():
        for level in model.levels:
            level.actnorm_bias.add_(0.05)
    figures = _samples(session, model, sampler, lr)
    if figures["mean"] == before:
        raise ValueError("other weights gave the same images")
    return figures


def _loader(session: Session) -> dict[str, Any]:
    model, (hr, lr, noise) = session.model(), session.batch(2, session.sizes.check_lr)
    train_encoder(model, True)
    images = TensorDataset(*(tensor.cpu().repeat(8, 1, 1, 1) for tensor in (hr, lr, noise)))
    loader = DataLoader(images, batch_size=2, num_workers=2, pin_memory=session.capture, prefetch_factor=4)
    step = graphs.TrainingStep(model, graphs.adam(model, 2e-4), graph=session.capture)
    losses = []
    for number, batch in enumerate(loader):
        on_device = [tensor.to(session.device, non_blocking=True) for tensor in batch]
        losses.append(float(step(*(tensor[: 1 + number % 2] for tensor in on_device))[0]))
    if len(losses) != 8:
        raise ValueError(f"the loader gave {len(losses)} of 8 batches")
    return {"losses": [rounded(loss) for loss in losses]}


def _generator(session: Session) -> torch.Generator:
    return torch.Generator(session.device).manual_seed(7)


def _within(errors: dict[str, float], allowed: dict[str, float]) -> dict[str, Any]:
    """The errors, rounded. Raises ValueError for one that is larger than allowed."""
    for what, error in errors.items():
        if not error <= allowed[what]:
            raise ValueError(f"the {what} of a replay is off by {error:.1e}, allowed {allowed[what]:.0e}")
    return {what: rounded(error) for what, error in errors.items()}
