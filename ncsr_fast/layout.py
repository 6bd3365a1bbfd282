"""Memory of the tensors that kernels read and write: whether there is any, and in which layout outputs lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def readable(tensors: Iterable[Tensor], by_pytorch: bool = False) -> bool:
    """True where kernels may be called on these tensors: their values lie in memory, and nothing but autograd looks on.

    Args:
        tensors: Of one call.
        by_pytorch: PyTorch's operators, which take tensors on the meta device as well, stand for the kernels.
    """
    return not traced() and all(map(is_eager if by_pytorch else has_memory, tensors))


def is_eager(x: Tensor) -> bool:
    """True for a plain tensor, one on the meta device included.

    False for a fake tensor, for any other subclass that says what operators do to it (DTensor …), and for a tensor that a
    transform of `torch.func` or a batched gradient wraps.
    """
    return _is_plain(x) and not is_wrapped(x)


def has_memory(x: Tensor) -> bool:
    """True for an eager tensor whose values lie in memory of its own."""
    return is_eager(x) and not x.is_meta


def is_wrapped(x: Tensor) -> bool:
    """True where a transform of `torch.func` or a batched gradient put something else in a tensor's place."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def traced() -> bool:
    """True where operators are recorded, or work on something else than memory, so that nothing would see a kernel's work.

    That is inside `torch.compile`, `torch.func`, forward-mode differentiation, `make_fx`, `FakeTensorMode` and
    `torch.jit.trace`.
    """
    if torch.compiler.is_compiling():
        return True
    modes, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    watched = mode(modes.PROXY) is not None or mode(modes.FAKE) is not None
    return watched or transformed() or torch._C._get_tracing_state() is not None


def transformed() -> bool:
    """True inside transforms of `torch.func` and forward-mode differentiation, which plain PyTorch operators alone know."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x in a memory format; as it lies inside transforms, some of which know none."""
    return x if transformed() else x.contiguous(memory_format=memory_format)


def in_memory(x: Tensor) -> Tensor:
    """x, or a copy where its memory does not hold its values.

    Such are negated and known-to-be-zero tensors (`torch._neg_view`, forward-mode gradients). Raises TypeError for a tensor
    without memory of its own.
    """
    if not _is_plain(x):
        raise TypeError(
            f"a kernel reads memory, and a {type(x).__name__} tensor may have none: use backend='reference' and engine='plain'"
        )
    if x.is_neg() or x._is_zerotensor():
        return x.resolve_neg().clone()
    return x


def writable(y: Tensor) -> Tensor:
    """y, whose memory a kernel may write to. Raises TypeError where that memory does not hold its values, or there is none."""
    if in_memory(y) is not y:
        raise TypeError("a kernel cannot write to a tensor with a negative bit, or to one that is known to be zero")
    return y


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN or type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def is_channels_last(x: Tensor) -> bool:
    """True for an image whose channels of a pixel are adjacent in memory, a slice of a channels-last tensor included."""
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and dense, of the shape, device and layout of x: an image (B, C, H, W), or matrices.

    Every output of a kernel is allocated here, and by the fake of its operator too, so that the strides agree.
    `torch.empty_like` would copy the strides of a permuted or sliced x instead.
    """
    return torch.empty_like(x, dtype=dtype, memory_format=dense_format(x))


def empty_channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised image (B, C, H, W) with the channels of a pixel adjacent, on the device and in the dtype of `like`."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format of what lies as x does, and is dense."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
