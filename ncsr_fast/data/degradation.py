"""User-defined degradations: functions that make the LR image of an HR crop."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EXAMPLE = 'write "bicubic", or "module:function", as in "my_degradations:blur" for the function blur of my_degradations.py'


class Degradation:
    """`function(hr, scale, generator) → lr`, with a check of its result.

    Args:
        hr: uint8 (3, scale·H, scale·W), on the CPU. The function may write to it.
        generator: torch.Generator, seeded by the run's seed and the crop's number. A function that draws random numbers only
            from it gives the same crops in every run, also in a resumed run.

    Returns:
        lr, uint8 (3, H, W).

    Raises:
        ValueError: The function returned anything else; the message names the function. Errors raised by the function itself
            pass through.
    """

    def __init__(self, function: Callable[[Tensor, int, torch.Generator], Tensor], name: str | None = None) -> None:
        self._function, self.name = function, name

    def __str__(self) -> str:
        return self.name or getattr(self._function, "__qualname__", repr(self._function))

    def __call__(self, hr: Tensor, scale: int, generator: torch.Generator) -> Tensor:
        """The LR image of hr; hr is not changed."""
        expected = (hr.shape[0], hr.shape[1] // scale, hr.shape[2] // scale)
        lr = self._function(hr.clone(), scale, generator)
        if not isinstance(lr, Tensor):
            raise ValueError(
                f"degradation {str(self)!r} must return a uint8 tensor of shape {expected}, not a {type(lr).__name__}"
            )
        if lr.dtype != torch.uint8 or tuple(lr.shape) != expected:
            raise ValueError(
                f"degradation {str(self)!r} must return a uint8 tensor of shape {expected}, not {lr.dtype} {tuple(lr.shape)}"
            )
        return lr

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle: a name, so that a spawned worker with another `sys.path` looks the function up itself."""
        return {"name": self.name, "_function": None if self.name else self._function}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name = state["name"]
        self._function = _look_up(self.name) if self.name else state["_function"]


def load_degradation(degradation: str | Callable[[Tensor, int, torch.Generator], Tensor]) -> Degradation | None:
    """None for "bicubic", else the `Degradation` of a function or of the name "module:function".

    The module is searched for in the current folder first, as by `python -m`.

    Raises:
        ValueError: The name is malformed, or there is no such function. Errors of importing the module pass through.
    """
    if degradation == "bicubic":
        return None
    if isinstance(degradation, str):
        return Degradation(_look_up(degradation), degradation)
    if not callable(degradation):
        raise ValueError(f"degradation must be a name or a function, not {degradation!r}: {_EXAMPLE}")
    return Degradation(degradation)


def _look_up(name: str) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"degradation {name!r} is malformed: {_EXAMPLE}")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()  # the module may have been written after this process started
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but imports a missing module
        raise ValueError(
            f"degradation {name!r}: there is no module {error.name!r}, neither in {folder!r} nor installed: {_EXAMPLE}"
        ) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"degradation {name!r}: {module_name} ({module.__file__}) has no function {function_name!r}: {_EXAMPLE}"
        )
    return function
