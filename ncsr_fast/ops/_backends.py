"""Which implementations of the operators there are on this machine, and the choice of one."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")
_MODULES = {"reference": "ncsr_fast.ops._reference", "native": "ncsr_fast.ops._native", "triton": "ncsr_fast.kernels"}
_NOT_INSTALLED = "this is a source tree that was not installed; in it: pip install -e ."
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


def resolve_backend(op: str, backend: str = "auto", like: Tensor | None = None, *, computes_float64: bool = False) -> str:
    """The backend that runs for a tensor: "auto" chooses, a named one is returned or raises `BackendUnavailable`.

    With `computes_float64`, every backend of the operator computes in float64.
    """
    kind, float64 = _kind_of(like)
    float64 = float64 and not computes_float64
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
    """The module with the functions of a backend: affine, gaussian (not the reference) and step, each `_fwd` and `_bwd`, and
    inverse_logdet."""
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
        return f"{error}; {_native_mend(Path(__file__).parents[1])}"
    # asked for CUDA tensors alone: the question initialises CUDA, which a child forked afterwards cannot use
    return native.native.cuda_unavailable() if kind == "cuda" else ""


def _triton_missing(kind: str, float64: bool) -> str:
    try:
        implementation("triton")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}): {_triton_mend(error)}"
    if float64:
        return "the Triton kernels compute in float32; use backend='native' or 'reference' for float64"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernels run on CUDA tensors; on CPU ones only in the interpreter (TRITON_INTERPRET=1)"
    return ""


def _native_mend(package: Path) -> str:
    """Advice where the compiled module cannot be imported."""
    modules = [path.name for path in package.glob("_native.*") if path.suffix in (".so", ".pyd")]
    account = package / "build_info.txt"  # setup.py's, of the installation
    if any(name == f"_native{suffix}" for name in modules for suffix in EXTENSION_SUFFIXES):
        return "it was built for another machine; install the package again on this one: pip install --force-reinstall ."
    if modules:
        return f"{modules[0]} was built for another Python; install the package again: {sys.executable} -m pip install ."
    if not account.exists():
        return _NOT_INSTALLED
    reason = account.read_text(encoding="utf-8").strip()
    return f"{reason}; with a C++ compiler (g++ or clang++), install the package again: pip install ."


def _triton_mend(error: ImportError) -> str:
    """Advice where the Triton kernels cannot be imported."""
    if error.name == _MODULES["triton"]:
        return _NOT_INSTALLED
    if error.name == "triton" and isinstance(error, ModuleNotFoundError):
        return "pip install 'ncsr_fast[triton]'" if sys.platform == "linux" else "there is no Triton for this system"
    return "another version is needed: pip install --upgrade 'ncsr_fast[triton]'"


def _description(name: str, kind: str) -> str:
    if name == "reference":
        return "plain PyTorch, any device and dtype"
    if name == "native":
        native = implementation("native").native
        return f"{'CUDA' if kind == 'cuda' else 'C++ for ' + native.instruction_set()} ({native.build_info})"
    return f"Triton {importlib.import_module('triton').__version__}" + (" (interpreter)" if kind == "cpu" else "")
