"""Memory layout of the tensors the kernels write: channels-last where the input is, NCHW otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory; also true of a slice of a channels-last tensor."""
    return x.stride(1) == 1 and not x.is_contiguous()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and dense, of the shape, device and layout of x (B, C, H, W).

    Every output of a kernel is allocated here, and by the fake of its operator too, so that the strides agree.
    `torch.empty_like` would copy the strides of a permuted or sliced x instead.
    """
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)
