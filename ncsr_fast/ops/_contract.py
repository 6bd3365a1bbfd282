"""The checks every operator makes of its arguments, and the choice of a backend. All in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used, and why not."""

    name: str
    available: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Which backends the operators have on this machine, and why the others are not there."""
    missing = "this version of ncsr_fast has no {} kernels yet; use backend='reference' or 'auto'"
    return {
        "reference": Backend("reference", True, "plain PyTorch, any device and dtype"),
        "native": Backend("native", False, missing.format("compiled C++/CUDA")),
        "triton": Backend("triton", False, missing.format("Triton")),
    }


def resolve_backend(op: str, backend: str) -> str:
    """The backend that runs: "auto" chooses, a named one is returned or raises `BackendUnavailable`."""
    if backend == "auto":
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    state = backends()[backend]
    if not state.available:
        raise BackendUnavailable(f"{op}: backend {backend!r} is not available: {state.reason}")
    return backend


def check_tensors(op: str, shapes: dict[str, tuple[Tensor, tuple[int, ...]]], like: str) -> None:
    """Raise unless every tensor has its shape and the dtype and device of the one called `like`."""
    first = shapes[like][0]
    for name, (tensor, shape) in shapes.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, not {tuple(tensor.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {like} is on {first.device}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} must be a floating-point tensor, not {tensor.dtype}")


def check_state(op: str, name: str, state: Tensor) -> tuple[int, int, int, int]:
    """The four sizes of a state tensor (B, C, H, W); raise when it is not one."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(state).__name__}")
    if state.dim() != 4 or state.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have shape (B, C, H, W) with C ≥ 1, not {tuple(state.shape)}")
    return tuple(state.shape)


def compute_dtype(state: Tensor) -> torch.dtype:
    """Arithmetic and log-determinants are float32 whatever the storage, float64 for float64."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32
