"""PyTorch's convolution of any odd kernel size at a stated precision, whatever the global flags say."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.precision import convolutions_are_rounded, has_cudnn, true_float32

Needed = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    """weight ∗ x + bias with zero padding that preserves the size; autograd does not record the precision.

    Args:
        x: (B, C, H, W).
        weight: (N, C, k, k), k odd, converted to the dtype of x.
        bias: (N,) or None.
        tf32: Permit a GPU to round float32 operands to TF32, unless PyTorch's flags forbid it.

    Returns:
        (B, N, H, W) in the dtype of x.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.device.type == "cuda" and has_cudnn():
        return convolve_by_cudnn(x, weight, bias, tf32)
    with true_float32(x):
        return F.conv2d(x, weight, bias, padding=_padding(weight))


def convolve_by_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, allow_tf32: bool) -> Tensor:
    """F.conv2d with the flag for TF32 as an argument; cuDNN's other flags have their present values."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    flags = cudnn.benchmark, deterministic, cudnn.enabled, allow_tf32
    options = [1, 1], _padding(weight), [1, 1], False, [0, 0], 1
    y: Tensor = torch.ops.aten._convolution.default(x, weight, bias, *options, *flags)
    return y


def convolve_backward(dy: Tensor, x: Tensor, weight: Tensor, needed: Needed, tf32: bool) -> Gradients:
    """The `needed` gradients of x, weight and bias of `convolve`, in the dtype of x."""
    with contextlib.nullcontext() if tf32 and x.device.type == "cuda" else true_float32(x):
        found: Gradients = torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), [weight.shape[0]], [1, 1], _padding(weight), [1, 1], False, [0, 0], 1, needed
        )
    return found


def convolve_as_recorded(x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
    """`convolve` for autograd, transforms and `torch.compile`, which may run it later under the program's flags.

    The convolution is computed in float64 if the program's flags would round operands and `tf32` does not permit it. In a
    compiled graph it follows the flags.
    """
    exact = x.dtype != torch.float32 or (tf32 and x.device.type == "cuda") or torch.compiler.is_compiling()
    dtype = x.dtype if exact or not convolutions_are_rounded(x.device.type) else torch.float64
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=_padding(weight)).to(x.dtype)


def _padding(weight: Tensor) -> list[int]:
    """The padding of both axes; a pair, because torch.jit.trace of torch 2.4 does not take one number made of sizes."""
    return [weight.shape[-1] // 2] * 2
