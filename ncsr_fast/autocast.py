"""`torch.autocast`: its precision for networks, and contexts in which it is off.

Under `torch.autocast` the networks of a model run at autocast's precision, as with the option `precision`. The state, the
log-dets and the 1×1 convolutions stay float32. A backward pass computes in the precision of its forward pass, wherever it is
called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of `torch.autocast` for a device type, or None if autocast is off."""
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def autocast(x: Tensor) -> Tensor:
    """x in the dtype in which a convolution under `torch.autocast` reads it; float64 is unchanged."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which operators run in the dtypes of their inputs."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def undecorated(function: Callable[..., Any]) -> tuple[Callable[..., Any], torch.autocast | None]:
    """The function under a decorator `@torch.autocast(…)`, and that autocast; the function itself and None if there is none."""
    inner = getattr(function, "__wrapped__", None)
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or () if inner is not None)
    found = next((content for content in cells if isinstance(content, torch.autocast)), None)
    return (function, None) if inner is None or found is None else (inner, found)
