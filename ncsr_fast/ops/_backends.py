"""Which implementations of the operators there are on this machine, and the choice of one."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")
_MODULES = {"reference": "ncsr_fast.ops._reference", "native": "ncsr_fast.ops._native", "triton": "ncsr_fast.kernels"}
_PREFERRED = {"cpu": ("native",), "cuda": ("triton", "native")}  # what "auto" tries before the reference


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used, and why not."""

    name: str
    available: bool
    reason: str


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Backend]:
    """Which backends the operators have for tensors of this device and dtype, and why the others are not there.

    `device` is the GPU when None and there is one, else the CPU.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    missing = {name: _missing(name, kind, dtype == torch.float64) for name in BACKENDS}
    return {name: Backend(name, not why, why or _description(name, kind)) for name, why in missing.items()}


def resolve_backend(op: str, backend: str = "auto", like: Tensor | None = None) -> str:
    """The backend that runs for a tensor: "auto" chooses, a named one is returned or raises `BackendUnavailable`."""
    kind, float64 = _kind_of(like)
    if backend == "auto":
        return _best(kind, float64)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    missing = _missing(backend, kind, float64)
    if missing:
        raise BackendUnavailable(f"{op}: backend {backend!r} is not available: {missing}")
    return backend


@functools.cache
def implementation(backend: str) -> ModuleType:
    """The module with the functions of a backend: affine, gaussian (not the reference) and step, each `_fwd` and `_bwd`."""
    return importlib.import_module(_MODULES[backend])


def _kind_of(like: Tensor | None) -> tuple[str, bool]:
    if like is None:
        return ("cuda" if torch.cuda.is_available() else "cpu"), False
    return like.device.type, like.dtype == torch.float64


def _constant(function: Callable[..., str]) -> Callable[..., str]:
    """Evaluated once, and when `torch.compile` meets it called instead of traced.

    The mark is what `torch.compiler.assume_constant_result` leaves, which would import the compiler to do so.
    """
    setattr(function, "_dynamo_marked_constant", True)
    cached = functools.cache(function)

    def call(*arguments: str | bool) -> str:
        return function(*arguments) if torch.compiler.is_compiling() else cached(*arguments)

    return call


@_constant
def _best(kind: str, float64: bool) -> str:
    return next((name for name in _PREFERRED.get(kind, ()) if not _missing(name, kind, float64)), "reference")


@_constant
def _missing(name: str, kind: str, float64: bool) -> str:
    """Why a backend cannot run, or nothing."""
    if name == "reference":
        return ""
    if kind not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA tensors, not on {kind} ones; use backend='reference'"
    return _native_missing(kind) if name == "native" else _triton_missing(kind, float64)


def _native_missing(kind: str) -> str:
    try:
        native = implementation("native")
    except ImportError as error:
        built = Path(__file__).parents[1] / "build_info.txt"  # setup.py's account of the installation
        account = built.read_text().strip() if built.exists() else "this is a source tree that was not installed"
        return f"{error} ({account}); reinstall where there is a C++ compiler: pip install ."
    return native.CUDA_MISSING if kind == "cuda" else ""


def _triton_missing(kind: str, float64: bool) -> str:
    try:
        implementation("triton")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}): pip install triton"
    if float64:
        return "the Triton kernels compute in float32; use backend='native' or 'reference' for float64"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernels run on CUDA tensors; on CPU ones only in the interpreter (TRITON_INTERPRET=1)"
    return ""


def _description(name: str, kind: str) -> str:
    if name == "reference":
        return "plain PyTorch, any device and dtype"
    if name == "native":
        native = implementation("native").native
        return f"{'CUDA' if kind == 'cuda' else 'C++ for ' + native.instruction_set()} ({native.build_info})"
    return f"Triton {importlib.import_module('triton').__version__}" + (" (interpreter)" if kind == "cpu" else "")
