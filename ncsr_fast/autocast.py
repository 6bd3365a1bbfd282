"""`torch.autocast`: the precision it asks for, and code that it does not touch.

Under it the networks of a model run at the precision it asks for, as with the option of that name. The state, its
log-determinants and the 1×1 convolutions stay float32, and a backward pass computes as its forward pass did, wherever it is
called.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that `torch.autocast` asks for on a kind of device, or None where it is off."""
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def autocast(x: Tensor) -> Tensor:
    """x as a convolution under `torch.autocast` would read it: in the dtype asked for, and float64 as it is."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Inside, operators run in the dtypes of their inputs."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
