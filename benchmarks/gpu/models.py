"""Times of the whole model: a training step and ten samples, ours in eager and as CUDA graphs, and the published program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast import NCSR, graphs
from ncsr_fast.benchmarks.harness import rounded
from ncsr_fast.engine import EngineOptions
from ncsr_fast.engine.ablation import ablated

from .capture import train_encoder
from .session import Session

_LEARNING_RATE, _NORM = 2e-4, 100.0
_TEMPERATURE = 0.9


def training(session: Session) -> None:
    """A step with Adam and clipping, in eager and as a graph, in each precision."""
    model = session.model()
    train_encoder(model, True)
    for precision in ("bf16", "tf32", "fp32"):
        for graph in (False, True):
            name = f"{precision}, {'graph' if graph else 'eager'}"
            session.part(name, _timed_step, session, model, graph, precision=precision)


def training_variants(session: Session) -> None:
    """The step in bf16 with one thing changed."""
    model = session.model()
    train_encoder(model, True)
    session.part("checkpoint=False", _timed_step, session, model, True, precision="bf16", checkpoint=False)
    for switch in ("subpixel", "channels_last"):
        session.part(f"{switch}=False", _without, switch, _timed_step, session, model, True, precision="bf16")
    train_encoder(model, False)
    session.part("encoder frozen", _timed_step, session, model, True, precision="bf16")


def training_profile(session: Session) -> None:
    """Profiles of a step in bf16: launches in eager, kernels as a graph."""
    model = session.model()
    train_encoder(model, True)
    for graph in (False, True):
        call = _step(session, model, graph, precision="bf16")[0]
        session.part("bf16, graph" if graph else "bf16, eager", _profile, session, call)


def sampling(session: Session) -> None:
    """Samples of a small LR image."""
    _all_samplings(session, session.sizes.image)


def sampling_div2k(session: Session) -> None:
    """Samples of an LR image of DIV2K's size."""
    _all_samplings(session, session.sizes.large_image)


def sampling_profile(session: Session) -> None:
    """Profiles of sampling in bf16."""
    model = session.model(precision="bf16").freeze_for_inference()
    for size in (session.sizes.image, session.sizes.large_image):
        session.part(f"bf16, {_describe(size)}", _profile, session, _sampler(session, model, size, True))


def published(session: Session) -> None:
    """The published program with TF32 convolutions, as PyTorch has them by default, and with the one line of ours."""
    if session.setup.published is None:
        session.skip("all", "no --published")
        return
    for accelerated in (False, True):
        name = "accelerated" if accelerated else "as it is"
        built: list[Any] = []
        session.part(f"built, {name}", lambda: _build_published(session, accelerated, built))
        for network in built:  # none, where it cannot be built
            session.part(f"training step, {name}", _published_step, session, network)
            for size, n in ((session.sizes.image, session.sizes.samples), (session.sizes.large_image, 1)):
                session.part(f"samples, {_describe(size)}, {name}", _published_samples, session, network, size, n)


def _step(session: Session, model: NCSR, graph: bool, **options: Any) -> tuple[Callable[[], Tensor], graphs.TrainingStep]:
    model.options = EngineOptions(**options)
    optimizer = graphs.adam(model, _LEARNING_RATE)
    step = graphs.TrainingStep(model, optimizer, max_grad_norm=_NORM, graph=graph and session.capture)
    batch = session.batch()
    return lambda: step(*batch)[0], step


def _timed_step(session: Session, model: NCSR, graph: bool, **options: Any) -> dict[str, Any]:
    call, step = _step(session, model, graph, **options)
    figures = session.seconds(call)
    done, skipped = step.counters[:2].tolist()
    if skipped:
        raise ValueError(f"{skipped} of {done} steps were skipped: loss or gradient was not finite")
    return {**figures, "images_per_s": rounded(session.sizes.batch / figures["median_s"]), "loss": float(call())}


def _without(switch: str, function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The figures that a function returns with a part of the engine switched off."""
    with ablated(**{switch: False}):
        return function(*arguments, **options)


def _all_samplings(session: Session, size: tuple[int, int]) -> None:
    model = session.model().freeze_for_inference()
    session.part("bf16, eager", _timed_samples, session, model, size, False, precision="bf16")
    for precision in ("bf16", "tf32", "fp32"):
        session.part(f"{precision}, graph", _timed_samples, session, model, size, True, precision=precision)
    for precision in ("bf16", "tf32"):
        name = f"{precision}, graph, subpixel=False"
        session.part(name, _without, "subpixel", _timed_samples, session, model, size, True, precision=precision)


def _timed_samples(session: Session, model: NCSR, size: tuple[int, int], graph: bool, **options: Any) -> dict[str, Any]:
    model.options = EngineOptions(**options)
    figures = session.seconds(_sampler(session, model, size, graph))
    return figures | {"samples": session.sizes.samples, "image": list(size)}


def _sampler(session: Session, model: NCSR, size: tuple[int, int], graph: bool) -> Callable[[], Tensor]:
    lr = session.random(1, 3, *size)
    sampler = graphs.Sampler(model, session.sizes.samples, graph=graph and session.capture)
    return lambda: sampler(lr, _TEMPERATURE)[0]


def _profile(session: Session, call: Callable[[], Any]) -> dict[str, Any]:
    call()
    call()
    return session.profile(call)


def _build_published(session: Session, accelerated: bool, built: list[Any]) -> dict[str, Any]:
    """Add its network to `built`."""
    from ncsr_fast.benchmarks.published import PublishedNCSR

    torch.backends.cudnn.allow_tf32 = True
    state = session.model().published_state_dict()
    built.append(PublishedNCSR(session.setup.published, state, session.device, accelerated, session.sizes.options))
    return {}


def _published_step(session: Session, network: Any) -> dict[str, Any]:
    """Forward, backward and Adam, as its trainer does them."""
    network.train_encoder(True)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], _LEARNING_RATE, (0.9, 0.99))
    batch = session.batch()

    def call() -> None:
        network.loss_and_gradients(*batch)
        optimizer.step()

    return session.seconds(call, rounds=5)


def _published_samples(session: Session, network: Any, size: tuple[int, int], n: int) -> dict[str, Any]:
    lr = session.random(1, 3, *size)
    with torch.no_grad():
        figures = session.seconds(lambda: network.sample(lr, n, _TEMPERATURE), rounds=3)
    return figures | {"samples": n, "image": list(size)}


def _describe(size: tuple[int, int]) -> str:
    return f"LR {size[0]}×{size[1]}"
