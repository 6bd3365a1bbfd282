"""The checks every operator makes of its arguments. All in one place: kernels get what has been checked here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def check_tensors(op: str, like: Tensor, *arguments: tuple[str, Tensor, tuple[int, ...]]) -> None:
    """Raise unless every (name, tensor, shape) has its shape, a floating-point dtype and the device of `like`."""
    for name, tensor, shape in arguments:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.device != like.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but the state is on {like.device}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} must be a floating-point tensor, not {tensor.dtype}")


def check_state(op: str, name: str, state: Tensor) -> tuple[int, int, int, int]:
    """The four sizes of a state tensor (B, C, H, W); raise when it is not one."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(state).__name__}")
    if state.dim() != 4 or state.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have shape (B, C, H, W) with C ≥ 1, not {tuple(state.shape)}")
    if state.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, not {state.dtype}")
    batch, channels, height, width = state.shape
    return batch, channels, height, width


def check_image(op: str, name: str, image: Tensor) -> tuple[int, int, int, int]:
    """The four sizes of an image tensor (B, C, H, W) to convolve, which has pixels; raise when it is not one."""
    sizes = check_state(op, name, image)
    if sizes[2] < 1 or sizes[3] < 1:
        raise ValueError(f"{op}: {name} must have H ≥ 1 and W ≥ 1, not shape {tuple(image.shape)}")
    return sizes


def check_matrices(op: str, weight: Tensor) -> tuple[int, int]:
    """N and C of a stack of matrices (N, C, C); raise when it is not one."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a tensor, not {type(weight).__name__}")
    if weight.dim() != 3 or weight.shape[1] < 1:
        raise ValueError(f"{op}: weight must have shape (N, C, C) with C ≥ 1, not {tuple(weight.shape)}")
    count, channels, _ = weight.shape
    check_tensors(op, weight, ("weight", weight, (count, channels, channels)))
    return count, channels


def check_eps(op: str, eps: float) -> None:
    """`eps` bounds the scale from below, so zero would admit a map without an inverse."""
    if not 0 < eps < float("inf"):
        raise ValueError(f"{op}: eps must be positive and finite, not {eps}")


def largest_condition(channels: int) -> float:
    """The condition number (∞-norm, float64) of C×C matrices from which on an inverse has no correct digit."""
    return 1 / (channels * torch.finfo(torch.float64).eps)


def check_conditions(name: str, conditions: Sequence[float], channels: int) -> None:
    """Raise where the inverse of a matrix with one of these condition numbers has no correct digit.

    Args:
        name: who is named; {} becomes the number of the matrix.
        conditions: condition numbers in the ∞-norm, NaN included.
        channels: C of the C×C matrices.
    """
    for index, condition in enumerate(conditions):
        if not condition < largest_condition(channels):
            raise ValueError(
                f"{name.format(index)}: weight is singular or not finite (condition number {condition:.1e}), so the 1×1 "
                "convolution has no inverse"
            )


def pass_through_channels(channels: int) -> int:
    """The number of channels z1 that a coupling reads and leaves unchanged: the first half."""
    return channels // 2


def compute_dtype(state: Tensor) -> torch.dtype:
    """Arithmetic and log-determinants are float32 whatever the storage, float64 for float64."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32
