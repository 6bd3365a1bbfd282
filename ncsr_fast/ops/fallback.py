"""Fallback for backends that compile kernels on the user's GPU: a kernel that fails is replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ncsr_fast.warn import warn_caller

Instead = Callable[[str, str, Tensor], "tuple[str, Callable[..., Any]] | None"]


class Guarded:
    """The functions of a backend; a function whose kernel fails is replaced for the rest of the process, with a warning.

    Args:
        module: The backend. Its functions raise its exception `KernelFailure` for a kernel that does not compile or start; its
            counter `launched` counts started kernels. Errors of arguments and of memory are raised unchanged.
        instead: Function (kernel, function, the call's first tensor) → the name of another backend and its function; None: the
            error is raised.
    """

    def __init__(self, module: ModuleType, instead: Instead) -> None:
        self._module, self._instead = module, instead

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        guarded = self._guarded(name, getattr(self._module, name))
        setattr(self, name, guarded)  # found there in later calls
        return guarded

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        failure, launched = self._module.KernelFailure, self._module.launched
        replacement: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal replacement
            if replacement is not None:
                return replacement(*arguments, **options)
            before = launched[0]
            try:
                return function(*arguments, **options)
            except failure as error:
                # running it again would add to an argument a second time
                begun = launched[0] > before and (options.get("accumulate") or options.get("dx") is not None)
                replacement = self._replacement(name, error, arguments, begun)
            return replacement(*arguments, **options)

        return call

    def _replacement(self, name: str, error: Any, arguments: tuple[Any, ...], begun: bool) -> Callable[..., Any]:
        """The function that runs from now on, after a warning."""
        like = next(leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
        found = None if begun else self._instead(_kernel(name), name, like)
        if found is None:
            raise error.__cause__
        backend, function = found
        warn_caller(f"the kernel {error.kernel} of {name} failed: {error}; from now on the backend {backend!r} runs instead")
        return function


def _kernel(function: str) -> str:
    """The kernel, by its name in `COVERAGE`, that a function belongs to."""
    for suffix in ("_forward", "_weights_backward", "_backward", "_layers", "_tails", "_coupled"):
        if function.endswith(suffix):
            return function.removesuffix(suffix)
    return function
