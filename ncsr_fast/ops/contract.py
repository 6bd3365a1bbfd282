"""Checks of the arguments of all operators; kernels receive only checked arguments."""

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
    """The four sizes of a state tensor (B, C, H, W); raise if `state` is not one."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(state).__name__}")
    if state.dim() != 4 or state.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have shape (B, C, H, W) with C ≥ 1, not {tuple(state.shape)}")
    if state.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, not {state.dtype}")
    batch, channels, height, width = state.shape
    return batch, channels, height, width


def check_image(op: str, name: str, image: Tensor) -> tuple[int, int, int, int]:
    """The four sizes of an image tensor (B, C, H, W) with H ≥ 1 and W ≥ 1; raise if `image` is not one."""
    sizes = check_state(op, name, image)
    if sizes[2] < 1 or sizes[3] < 1:
        raise ValueError(f"{op}: {name} must have H ≥ 1 and W ≥ 1, not shape {tuple(image.shape)}")
    return sizes


def check_matrices(op: str, weight: Tensor) -> tuple[int, int]:
    """N and C of a stack of matrices (N, C, C); raise if `weight` is not one."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a tensor, not {type(weight).__name__}")
    if weight.dim() != 3 or weight.shape[1] < 1:
        raise ValueError(f"{op}: weight must have shape (N, C, C) with C ≥ 1, not {tuple(weight.shape)}")
    count, channels, _ = weight.shape
    check_tensors(op, weight, ("weight", weight, (count, channels, channels)))
    return count, channels


def check_eps(op: str, eps: float) -> None:
    """Raise unless `eps`, the lower bound of the scale, is positive: zero would admit a map without an inverse."""
    if not 0 < eps < float("inf"):
        raise ValueError(f"{op}: eps must be positive and finite, not {eps}")


def largest_condition(channels: int) -> float:
    """The condition number (∞-norm, float64) from which on the inverse of a C×C matrix has no correct digit."""
    return 1 / (channels * torch.finfo(torch.float64).eps)


def check_conditions(name: str, conditions: Sequence[float], channels: int) -> None:
    """Raise where the inverse of a matrix with one of these condition numbers has no correct digit.

    Args:
        name: The name that the message gives to the matrix; {} becomes its number.
        conditions: Condition numbers in the ∞-norm; NaN raises too.
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
    """The dtype of arithmetic and log-dets: float64 for a float64 state, else float32."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32
