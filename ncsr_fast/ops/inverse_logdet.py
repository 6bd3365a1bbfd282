"""Inverse and log|det| of the matrices of 1×1 convolutions, computed on the device without reading a value on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncsr_fast.ops import plain_inverse
from ncsr_fast.ops.backend import kernels, resolve_backend
from ncsr_fast.ops.contract import check_conditions, check_matrices, largest_condition
from ncsr_fast.ops.operator import Operator, Pair, Tensors
from ncsr_fast.ops.registration import Signature
from ncsr_fast.synchronization import reading_is_free


def inverse_logdet(weight: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """W⁻¹ and log|det W| of square matrices, in float64.

    The algorithm is Gauss-Jordan elimination with partial pivoting, one matrix per block on a GPU and per thread on a CPU.
    Nothing waits for the device, so a CUDA graph can capture the call. The reference is PyTorch's LU.

    Args:
        weight: W (N, C, C), of any floating-point dtype.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        W⁻¹ (N, C, C) and log|det W| (N,), in float64 and differentiable: if G and g are their gradients, dW = -W⁻ᵀ·G·W⁻ᵀ +
        g·W⁻ᵀ. W⁻¹ is saved for the backward pass.

    Raises:
        ValueError: On the CPU, the inverse of a matrix has no correct digit; the message names the matrix. On a GPU that
            inverse is NaN instead, and so is the reference's inside `torch.compile` and transforms of `torch.func`.
        ValueError, TypeError: A wrong shape or dtype.

    Example:
        >>> inverse, logdet = ops.inverse_logdet(torch.randn(18, 12, 12))
    """
    check_matrices("inverse_logdet", weight)
    return invert(weight, "inverse_logdet: matrix {}", backend=backend)


def invert(weight: Tensor, name: str, *, needs_inverse: bool = True, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`inverse_logdet` of checked arguments.

    Args:
        weight: W (N, C, C).
        name: The name that messages give to a matrix without an inverse; {} becomes its number.
        needs_inverse: False: only log|det| is needed, which every matrix has, so singular matrices are not refused.
        backend: As for `inverse_logdet`.
    """
    backend = resolve_backend("inverse_logdet", backend, weight)
    inverse, logdet = _inverse_logdet((weight.double(),), name, needs_inverse, backend)
    return inverse, logdet


def _forward(tensors: tuple[Tensor], name: str, needs_inverse: bool, backend: str) -> tuple[Pair, Tensors]:
    inverse, logdet = _checked(kernels(backend).inverse_logdet(*tensors), name, needs_inverse)
    return (inverse, logdet), (inverse,)


def _reference(weight: Tensor, name: str, needs_inverse: bool, _: str) -> Pair:
    return _checked(plain_inverse.inverse_logdet(weight), name, needs_inverse)  # imported, since torch.compile traces it


def _checked(found: tuple[Tensor, Tensor, Tensor], name: str, needs_inverse: bool) -> Pair:
    """(inverse, logdet) from a backend; an inverse without a correct digit is NaN if values may not be read."""
    inverse, logdet, condition = found
    if not needs_inverse:
        return inverse, logdet
    channels = inverse.shape[-1]
    if reading_is_free(condition):
        check_conditions(name, condition.tolist(), channels)
        return inverse, logdet
    return torch.where((condition < largest_condition(channels))[:, None, None], inverse, math.nan), logdet


def _backward(grads: Pair, _: Tensors, saved: tuple[Tensor], __: object, *settings: object) -> tuple[Tensor]:
    dinverse, dlogdet = grads
    transposed = saved[0].transpose(1, 2)
    through_logdet = dlogdet[:, None, None] * transposed
    return (torch.baddbmm(through_logdet, transposed @ dinverse, transposed, alpha=-1).contiguous(),)


def _fake(weight: Tensor, *_: object) -> Pair:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


_inverse_logdet = Operator(
    "inverse_logdet",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature("Tensor weight", "str name, bool needs_inverse, str backend", fake=_fake, saved=(0,)),
)
