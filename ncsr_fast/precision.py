"""True float32 where the package convolves or multiplies, whatever PyTorch's global flags say.

The flags let PyTorch round the operands of float32 convolutions and products: on a GPU to TF32, which cuDNN does by default; on
a CPU to TF32 or bfloat16, if it has instructions for them. The relative error of an operand is then 5e-4 or 4e-3. oneDNN's flag
for products also affects convolutions, because PyTorch computes small convolutions as products.

The flags are global to the process and its threads. So passes are counted: the first pass to begin makes the flags exact, and
the last pass to end restores them. A flag that the program sets meanwhile keeps the program's value. No pass waits for another.
A pass that permits TF32 changes no flag, and is more exact than necessary while a pass in another thread needs exact flags. The
functions of this module that read the flags return what the program has set, not what a pass has made of it.

While a pass is in progress on a GPU, PyTorch refuses to read `torch.backends.cudnn.allow_tf32`, as it does after a program has
set `torch.backends.fp32_precision`: that flag cannot be changed and restored. So forward passes on a GPU change no flag (see
`ncsr_fast.ops.conv3x3`), and backward passes change flags only for the duration of one call, which runs no code of the user's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_EXACT = ("ieee", "none", "highest", False)  # values of flags under which nothing is rounded


class _Flag(NamedTuple):
    """A global flag of PyTorch."""

    name: str  # "conv" (before torch 2.9 "cudnn", for GPUs only), "matmul", or "all", from which these two may inherit
    read: Callable[[], Any]
    read_own: Callable[[], Any]  # the same, but "none" where the value is inherited
    write: Callable[[Any], None]
    exact: Any  # the value for true float32


class _Flags:
    """The flags of a device, and the number of passes in progress that need them exact."""

    def __init__(self, flags: list[_Flag]) -> None:
        self._flags = flags  # "all" first: flags that still round after it have a value of their own, which can be restored
        self._inside = 0
        self._own: dict[str, Any] = {}  # by name: the value to restore
        self._found: dict[str, Any] = {}  # by name: the value that the program has set

    def enter(self) -> None:
        with _LOCK:
            if not self._inside:
                self._found = {flag.name: flag.read() for flag in self._flags}
            self._inside += 1
            for flag in self._flags:
                value = flag.read()
                if value != flag.exact:
                    self._found[flag.name], self._own[flag.name] = value, flag.read_own()
                    flag.write(flag.exact)

    def leave(self) -> None:
        with _LOCK:
            self._inside -= 1
            if self._inside:
                return
            for flag in reversed(self._flags):
                if flag.name in self._own and flag.read() == flag.exact:
                    flag.write(self._own[flag.name])
            self._own.clear()

    def let_round(self, *names: str) -> bool:
        """True if the program has set one of these flags to a value that lets operands be rounded."""
        with _LOCK:
            values = [flag.read() for flag in self._flags if flag.name in names]
            if self._inside:
                values += [self._found[flag.name] for flag in self._flags if flag.name in names]
        return not all(value in _EXACT for value in values)


def _flags_of(backend: str) -> _Flags:
    """Flags of "cuda" or "mkldnn", of torch ≥ 2.9.

    They are read and written as by `torch.backends`, except that `torch.backends.mkldnn.fp32_precision` writes another flag
    than it reads. The flag of cuDNN's convolutions has an initial value that cannot be written, "tf32 unless another value is
    inherited", so it is changed through "all".
    """
    get, set_ = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

    def own_of_all() -> str:
        value, inherited = get(backend, "all"), get("generic", "all")
        if value != inherited or value == "none":
            return value
        set_("generic", "all", "ieee")  # temporarily, to see if "all" follows
        own = get(backend, "all")
        set_("generic", "all", inherited)
        return own if own == value else "none"

    def flag(name: str, read_own: Callable[[], str] | None = None) -> _Flag:
        def read() -> str:
            return get(backend, name)

        return _Flag(name, read, read_own or read, lambda value: set_(backend, name, value), "ieee")

    return _Flags([flag("all", own_of_all), flag("conv"), flag("matmul")])


def _flags_before_2_9() -> _Flags:
    """The flags before torch 2.9: one for cuDNN's convolutions, and one for all products on any device."""
    cudnn, read, write = torch.backends.cudnn, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision

    def allowed() -> bool:
        return cudnn.allow_tf32

    convolutions = _Flag("cudnn", allowed, allowed, lambda value: setattr(cudnn, "allow_tf32", value), False)
    return _Flags([convolutions, _Flag("matmul", read, read, write, "highest")])


def _flags() -> dict[str, _Flags]:
    """The flags by device type."""
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        return {"cpu": _flags_of("mkldnn"), "cuda": _flags_of("cuda")}
    return dict.fromkeys(("cpu", "cuda"), _flags_before_2_9())


_LOCK = threading.RLock()
_FLAGS = _flags()


def has_cudnn() -> bool:
    """True if PyTorch convolves on a GPU with cuDNN; otherwise it uses matrix products."""
    return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled


@contextlib.contextmanager
def true_float32(like: Tensor) -> Iterator[None]:
    """A context in which convolutions and products of tensors like `like`, if it is float32, round no operand."""
    flags = _FLAGS.get(like.device.type) if like.dtype == torch.float32 else None
    if flags is None:
        yield
        return
    flags.enter()
    try:
        yield
    finally:
        flags.leave()


def convolutions_are_rounded(device_type: str) -> bool:
    """True if the program lets PyTorch round the operands of float32 convolutions, as it does by default on a GPU."""
    gpu_flags = ("conv", "cudnn") if has_cudnn() else ("matmul",)
    names = gpu_flags if device_type == "cuda" else ("conv", "matmul")
    return device_type in _FLAGS and _FLAGS[device_type].let_round(*names)


def products_are_rounded(device_type: str) -> bool:
    """True if the program lets PyTorch round the operands of float32 matrix products."""
    return device_type in _FLAGS and _FLAGS[device_type].let_round("matmul")


# torch.compile calls it instead of tracing it, and recompiles when those flags change. The mark is what
# torch.compiler.assume_constant_result leaves, which would import the compiler to do so.
products_are_rounded._dynamo_marked_constant = True


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float64 where the program lets float32 operands be rounded. Differentiable."""
    if a.dtype == torch.float32 and products_are_rounded(a.device.type):
        return (a.double() @ b.double()).float()
    return a @ b
