"""Operators for which the host waits until a GPU has done everything queued before, by name; none can be in a CUDA graph.

PyTorch's own check, `torch.cuda.set_sync_debug_mode`, needs a GPU and does not know of the waits inside linear algebra.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# read a value, or have a result whose size depends on values: on any device, so that a CPU shows what a GPU would do
_READING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "unique",
    "_unique", "bincount",
)  # fmt: skip
# on a GPU go to MAGMA, or to calls of cuSOLVER that PyTorch waits for, depending on sizes; linalg_lu_solve and
# linalg_solve_triangular go to cuBLAS
_SOLVING = (
    "_linalg_slogdet", "_linalg_det", "slogdet", "linalg_lu", "linalg_lu_factor", "linalg_lu_factor_ex", "linalg_inv_ex",
    "linalg_inv", "inverse", "_linalg_solve_ex", "linalg_solve", "linalg_solve_ex", "linalg_ldl_factor_ex", "linalg_lstsq",
    "linalg_cholesky_ex", "cholesky_inverse", "linalg_eig", "_linalg_eigh", "_linalg_svd", "linalg_qr", "geqrf",
)  # fmt: skip
_MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")
_COPIES = ("copy_", "_to_copy", "_copy_from")


class HostWaits(RuntimeError):
    """The host would wait for the GPU."""


class NoWaiting(TorchDispatchMode):
    """Inside, an operator that makes the host wait for a GPU raises HostWaits instead.

    On CPU tensors it refuses what reads values, which code for a GPU must not do; on a GPU's, real or fake (`fake_cuda`), also
    linear algebra that PyTorch waits for, and copies from and to the CPU.
    """

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        reason = reason_to_wait(operator, args, kwargs)
        if reason:
            raise HostWaits(f"{operator.name()} makes the host wait for the device: {reason}")
        return operator(*args, **kwargs)


def reason_to_wait(operator: Any, args: tuple, kwargs: dict) -> str:
    """Why a call of an operator makes the host wait; empty if it does not.

    Args:
        operator: A `torch._ops.OpOverload`, as a dispatch mode is told.
        args: Its arguments.
        kwargs: The same.
    """
    name = operator.name().split("::")[1].split(".")[0]
    if name.startswith(_READING):
        return "it reads values"
    if name in _MASKED and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        return "the size of a mask's selection is a value"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "without output_size the size of its result is a value"
    tensors = tensors_in(args, kwargs)
    if not any(map(on_gpu, tensors)):
        return "it copies to the GPU" if name in _COPIES and _is_gpu(kwargs.get("device")) else ""
    if name in _SOLVING:
        return "MAGMA and cuSOLVER synchronise"
    if name in _COPIES and not _non_blocking(operator, args, kwargs):
        if any(not on_gpu(tensor) for tensor in tensors) or not _is_gpu(kwargs.get("device", "cuda")):
            return "it copies between the GPU and the CPU"
    return ""


def on_gpu(tensor: Tensor) -> bool:
    """True for a tensor of a GPU, real or fake. In a dispatch mode a fake one may say that it is on the meta device."""
    return tensor.is_cuda or tensor.is_meta


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_gpu(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _non_blocking(operator: Any, args: tuple, kwargs: dict) -> bool:
    """True for a copy that the host does not wait for, if its CPU memory is pinned."""
    names = [argument.name for argument in operator._schema.arguments]
    return bool((dict(zip(names, args)) | kwargs).get("non_blocking"))
