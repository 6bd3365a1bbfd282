"""The backends of the operators: what each of them covers, which are available on this machine, and the choice of one."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ncsr_fast import tuning
from ncsr_fast.ops.fallback import Guarded
from ncsr_fast.ops.protocol import Kernels

BACKENDS = ("reference", "native", "triton")
_MODULES = {"reference": "ncsr_fast.ops.reference", "native": "ncsr_fast.ops.native", "triton": "ncsr_fast.kernels"}
_NOT_INSTALLED = "this is a source tree that was not installed; run there: pip install -e ."
_PREFERRED = {"cpu": ("native",)}  # what "auto" tries before the reference; on a GPU its table says so (`ncsr_fast.tuning`)


class Coverage(NamedTuple):
    """The devices and dtypes of tensors for which a backend has an operator."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
# "cpu" of Triton is its interpreter
COVERAGE: dict[str, dict[str, Coverage]] = {
    "native": {
        "affine": Coverage(("cpu", "cuda"), _FLOATS),
        "gaussian_split": Coverage(("cpu", "cuda"), _FLOATS),
        "flow_step": Coverage(("cpu", "cuda"), _FLOATS),
        "inverse_logdet": Coverage(("cpu", "cuda"), _FLOATS),
        "fold": Coverage(("cpu",), _FLOATS),
        "conv3x3": Coverage(("cpu",), _WIDE),
        "step_network": Coverage(("cpu",), _WIDE),
    },
    "triton": {
        "affine": Coverage(("cpu", "cuda"), _NARROW),
        "gaussian_split": Coverage(("cpu", "cuda"), _NARROW),
        "flow_step": Coverage(("cpu", "cuda"), _NARROW),
        "flow_step_mix": Coverage(("cpu", "cuda"), _NARROW),
        "inverse_logdet": Coverage(("cpu", "cuda"), _FLOATS),
        "fold_filters": Coverage(("cpu", "cuda"), _NARROW),
        "conv3x3": Coverage(("cpu", "cuda"), _NARROW),
        "conv3x3_weights": Coverage(("cpu", "cuda"), _NARROW),
        "dense_blocks": Coverage(("cpu", "cuda"), _NARROW),
        "hoisted": Coverage(("cpu", "cuda"), _NARROW),
        "step_network": Coverage(("cpu", "cuda"), _NARROW),
        "step_network_weights": Coverage(("cpu", "cuda"), _NARROW),
    },
}


# Kernels that a backend uses for several convolutions at once, wherever it is the one that convolves: without entries in tables
COMPANIONS = {
    "conv3x3_weights": "conv3x3", "dense_blocks": "conv3x3", "hoisted": "conv3x3",
    "flow_step_mix": "flow_step", "step_network_weights": "step_network", "fold_filters": "step_network",
}  # fmt: skip

_KERNELS = {"affine_injector": "affine", "affine_coupling": "affine", "actnorm_invconv": "flow_step"}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """A backend by name: whether it is `available`, and if not, the reason."""

    name: str
    available: bool
    reason: str


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Backend]:
    """The backends of the flow's operators for tensors of a device and dtype, with the reason if one is not available.

    Args:
        device: The tensors' device; None is the GPU if there is one, else the CPU.
        dtype: The tensors' dtype.

    Returns:
        A `Backend` for each name: "reference", "native", "triton".
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    missing = {name: _missing(name, "affine", kind, _DTYPE_NAMES.get(dtype, str(dtype))) for name in BACKENDS}
    return {name: Backend(name, not why, why or _description(name, kind)) for name, why in missing.items()}


def kernel_of(op: str) -> str:
    """The kernel of an operator, as `COVERAGE` names it: its own name, unless operators share a kernel."""
    return _KERNELS.get(op, op)


def resolve_backend(op: str, backend: str = "auto", like: Tensor | None = None) -> str:
    """The name of the backend that runs an operator for tensors like `like`.

    Args:
        op: The operator, as messages name it.
        backend: "auto" chooses the fastest that can run; a backend by name is returned or refused.
        like: A tensor of the device and dtype in question; None is float32 on the GPU if there is one, else on the CPU.

    Raises:
        BackendUnavailable: The named backend cannot run; the message says what is missing.
        ValueError: There is no backend of that name.
    """
    kind, dtype = _kind_of(like)
    kernel = kernel_of(op)
    if backend == "auto":
        return _best(kernel, kind, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, not {backend!r}")
    missing = _refusal(backend, kernel, kind, dtype)
    if missing:
        raise BackendUnavailable(f"{op}: backend {backend!r} is not available: {missing}")
    return backend


def covering_backend(kernel: str, backend: str, like: Tensor) -> str:
    """`backend` if it has the kernel for tensors like `like`, else "reference"; "auto" chooses as `resolve_backend` does."""
    kind, dtype = _kind_of(like)
    if backend == "auto":
        return _best(kernel, kind, dtype)
    return "reference" if _refusal(backend, kernel, kind, dtype) else backend


def companion_backend(kernel: str, backend: str, like: Tensor) -> str:
    """`covering_backend` of one of `COMPANIONS`: the backend of its other kernel, if it has both."""
    chosen = covering_backend(COMPANIONS[kernel], backend, like)
    if backend == "auto":
        return chosen if kernel in COVERAGE.get(chosen, {}) else "reference"
    return covering_backend(kernel, backend, like)


@functools.cache
def kernels(backend: str) -> Kernels:
    """The functions of a backend; a Triton function that fails to compile or to launch is replaced by another backend's."""
    module = importlib.import_module(_MODULES[backend])
    return cast(Kernels, Guarded(module, _instead) if backend == "triton" else module)


def _instead(kernel: str, function: str, like: Tensor) -> tuple[str, Callable[..., Any]] | None:
    """The backend and function that replace a failing Triton function; None for a kernel that was asked for by name."""
    if ("triton", kernel) in _named:
        return None
    kind, dtype = _kind_of(like)
    order = [name for name in (*_order(kernel, kind, dtype), "reference") if name != "triton"]
    name = next(name for name in order if not _missing(name, kernel, kind, dtype))
    return name, getattr(kernels(name), function)


def forget() -> None:
    """Forget the choices of "auto", so that they are made again, by tables that are read again."""
    _best.forget()
    tuning.forget()


_DTYPE_NAMES = {dtype: str(dtype) for dtype in _FLOATS}


def _kind_of(like: Tensor | None) -> tuple[str, str]:
    """The type of the tensor's device, and the name of its dtype."""
    if like is None:
        return ("cuda" if torch.cuda.is_available() else "cpu"), "torch.float32"
    return like.device.type, _DTYPE_NAMES.get(like.dtype, "another dtype")


class _Constant(Protocol):
    """A function that caches its results by argument, until `forget` is called."""

    forget: Callable[[], None]

    def __call__(self, *arguments: str) -> str: ...


def _constant(function: Callable[..., str]) -> _Constant:
    """Evaluated once, and when `torch.compile` meets it called instead of traced.

    The mark is what `torch.compiler.assume_constant_result` leaves, which would import the compiler to do so.
    """
    setattr(function, "_dynamo_marked_constant", True)
    cached = functools.cache(function)

    def call(*arguments: str) -> str:
        return function(*arguments) if torch.compiler.is_compiling() else cached(*arguments)

    setattr(call, "forget", cached.cache_clear)
    return cast(_Constant, call)


@_constant
def _best(kernel: str, kind: str, dtype: str) -> str:
    return next((name for name in _order(kernel, kind, dtype) if not _missing(name, kernel, kind, dtype)), "reference")


def _order(kernel: str, kind: str, dtype: str) -> tuple[str, ...]:
    """The backends that "auto" tries before the reference, the best first."""
    covered = kind == "cuda" and any(not _not_covered(name, kernel, kind, dtype) for name in COVERAGE)
    return tuning.preferred(kernel, dtype.removeprefix("torch.")) if covered else _PREFERRED.get(kind, ())


_named: set[tuple[str, str]] = set()  # backends that were asked for by name, and the kernel: nothing may run instead


@_constant
def _refusal(name: str, kernel: str, kind: str, dtype: str) -> str:
    """The reason why a backend that is asked for by name cannot run a kernel, or an empty text."""
    _named.add((name, kernel))
    return _missing(name, kernel, kind, dtype)


@_constant
def _missing(name: str, kernel: str, kind: str, dtype: str) -> str:
    """The reason why a backend cannot run a kernel, or an empty text."""
    if name == "reference":
        return ""
    if kind not in ("cpu", "cuda"):
        return f"it runs on CPU and CUDA tensors, not on {kind} tensors; use backend='reference'"
    return (_native_missing(kind) if name == "native" else _triton_missing(kind)) or _not_covered(name, kernel, kind, dtype)


def _not_covered(name: str, kernel: str, kind: str, dtype: str) -> str:
    """The reason why a backend that is available cannot run a kernel, or an empty text."""
    coverage = COVERAGE[name].get(kernel)
    if coverage is None:
        return f"it has no {kernel}; use backend='reference'"
    if kind not in coverage.devices:
        return f"its {kernel} runs on {' and '.join(coverage.devices)} tensors, not on {kind} tensors; use backend='reference'"
    if dtype not in map(str, coverage.dtypes):
        others = [other for other in BACKENDS if other != name and dtype in map(str, _dtypes(other, kernel))]
        return f"its {kernel} does not compute in {dtype.removeprefix('torch.')}; use backend={' or '.join(map(repr, others))}"
    return ""


def _dtypes(name: str, kernel: str) -> tuple[torch.dtype, ...]:
    return _FLOATS if name == "reference" else COVERAGE[name][kernel].dtypes if kernel in COVERAGE[name] else ()


def _native_missing(kind: str) -> str:
    try:
        native = compiled_module()
    except ImportError as error:
        return f"{error}; {_native_mend(Path(__file__).parents[1])}"
    # asked for CUDA tensors alone: the question initialises CUDA, which a child forked afterwards cannot use
    return native.cuda_unavailable() if kind == "cuda" else ""


def _triton_missing(kind: str) -> str:
    try:
        kernels("triton")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}): {_triton_mend(error)}"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernels run on CUDA tensors; on CPU tensors only in the interpreter (TRITON_INTERPRET=1)"
    return ""


def compiled_module() -> Any:
    """The compiled module `ncsr_fast._native`; raise ImportError if there is none for this Python and machine."""
    return importlib.import_module("ncsr_fast._native")


def _native_mend(package: Path) -> str:
    """Advice where the compiled module cannot be imported."""
    modules = [path.name for path in package.glob("_native.*") if path.suffix in (".so", ".pyd")]
    account = package / "build_info.txt"  # setup.py's, of the installation
    if any(name == f"_native{suffix}" for name in modules for suffix in EXTENSION_SUFFIXES):
        return "it was built for another machine; install the package again on this machine: pip install --force-reinstall ."
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
        return "PyTorch, any device and dtype"
    if name == "native":
        native = compiled_module()
        return f"{'CUDA' if kind == 'cuda' else 'C++ for ' + native.instruction_set()} ({native.build_info})"
    return f"Triton {importlib.import_module('triton').__version__}" + (" (interpreter)" if kind == "cpu" else "")
