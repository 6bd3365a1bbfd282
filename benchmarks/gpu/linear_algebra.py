"""log|det| and inverses of a level's 1×1 convolutions: PyTorch's two libraries and ours; who waits, and who can be captured."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsr_fast import ops
from ncsr_fast.benchmarks.harness import REFERENCE, brief, rounded

from .session import Session, synchronising

_OURS = "ours, "
_ALLOWED = 1e-10  # of float64 rounding in matrices near rotations


def linear_algebra(session: Session) -> None:
    """Time, errors, and whether a call waits for the device."""
    for shape in session.sizes.matrices:
        weight = matrices(session, *shape)
        for name, function in functions(session).items():
            session.part(f"{name}, {_describe(shape)}", _measured, session, name, function, weight)


def linear_algebra_captured(session: Session) -> None:
    """Capture of each call. Ours must succeed, and goes first: a library that cannot be captured may be unusable afterwards."""
    every = functions(session)
    for name in sorted(every, key=lambda name: (not _is_ours(name), "cusolver" not in name)):
        for shape in session.sizes.matrices:
            session.part(f"{name}, {_describe(shape)}", _captured, session, name, every[name], matrices(session, *shape))


def matrices(session: Session, count: int, channels: int) -> Tensor:
    """Weights (count, C, C), float32: rotations, moved a little as training moves them."""
    generator = torch.Generator().manual_seed(channels)
    draws = torch.randn(2, count, channels, channels, generator=generator)
    return (torch.linalg.qr(draws[0])[0] + 0.1 / channels * draws[1]).to(session.device)


def functions(session: Session) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Weight to results: PyTorch's, and ours on each backend."""
    found = {
        "slogdet": lambda weight: (torch.linalg.slogdet(weight.double())[1],),
        "inv_ex": lambda weight: (torch.linalg.inv_ex(weight.double())[0],),
    }
    if session.device == "cuda":
        found |= {f"{name}, cusolver": _with_cusolver(function) for name, function in dict(found).items()}
    ours = [backend for backend in session.backends() if backend != REFERENCE]
    return found | {f"{_OURS}{backend}": functools.partial(ops.inverse_logdet, backend=backend) for backend in ours}


def _is_ours(name: str) -> bool:
    return name.startswith(_OURS)


def _with_cusolver(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def call(weight: Tensor) -> tuple[Tensor, ...]:
        with _cusolver():
            return function(weight)

    return call


@contextlib.contextmanager
def _cusolver():
    before = torch.backends.cuda.preferred_linalg_library()
    torch.backends.cuda.preferred_linalg_library("cusolver")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(before)


def _measured(session: Session, name: str, function: Callable[[Tensor], tuple[Tensor, ...]], weight: Tensor) -> dict[str, Any]:
    if _is_ours(name):
        _check(function(weight), weight)
    function(weight)
    waits = synchronising(session.events(lambda: function(weight))) - synchronising(session.events(lambda: None))
    return {**session.seconds(lambda: function(weight)), "waits_for_the_device": waits}


def _captured(session: Session, name: str, function: Callable[[Tensor], tuple[Tensor, ...]], weight: Tensor) -> dict[str, Any]:
    try:
        replay = session.captured(lambda: function(weight))
        replay()
        session.synchronize()
    except Exception as error:
        if _is_ours(name):
            raise
        return {"captured": False, "why": brief(error)}
    if _is_ours(name):
        _check(replay(), weight)
    return {"captured": True, "device_s": rounded(session.device_seconds(lambda: function(weight)))}


def _check(found: tuple[Tensor, ...], weight: Tensor) -> None:
    """Raise ValueError where the inverse or the sum of the log|det| is not NumPy's in float64."""
    exact = weight.cpu().double().numpy()
    inverse, logdet = (tensor.cpu().double().numpy() for tensor in found)
    for what, value, expected in (
        ("inverse", inverse, np.linalg.inv(exact)),
        ("log|det|", logdet.sum(), np.linalg.slogdet(exact)[1].sum()),
    ):
        error = float(np.abs(value - expected).max() / np.abs(expected).max())
        if not error <= _ALLOWED:
            raise ValueError(f"inverse_logdet: the {what} is off by {error:.1e}, allowed {_ALLOWED:.0e}")


def _describe(shape: tuple[int, int]) -> str:
    return f"{shape[0]} of {shape[1]}×{shape[1]}"
