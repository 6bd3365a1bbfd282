"""Memory and layout of the tensors that kernels read and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def readable(tensors: Iterable[Tensor], by_pytorch: bool = False) -> bool:
    """True if kernels may be called on these tensors: they have memory, and nothing but autograd records the call.

    Args:
        tensors: The tensors of one call.
        by_pytorch: True: the kernels are made of PyTorch's operators, which also take tensors on the meta device.
    """
    return not traced() and all(map(is_eager if by_pytorch else has_memory, tensors))


def is_eager(x: Tensor) -> bool:
    """True for an ordinary tensor, also on the meta device.

    False for a fake tensor, for any other subclass that defines its own operators (DTensor …), and for a tensor wrapped by a
    transform of `torch.func` or by a batched gradient.
    """
    return _is_plain(x) and not is_wrapped(x)


def has_memory(x: Tensor) -> bool:
    """True for an eager tensor that has its values in its own memory."""
    return is_eager(x) and not x.is_meta


def is_wrapped(x: Tensor) -> bool:
    """True if a transform of `torch.func` or a batched gradient wraps the tensor."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def traced() -> bool:
    """True if operators are recorded or do not work on memory, so that the effect of a kernel would be lost.

    This is so inside `torch.compile`, `torch.func`, forward-mode differentiation, `make_fx`, `FakeTensorMode` and
    `torch.jit.trace`.
    """
    if torch.compiler.is_compiling():
        return True
    modes, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    watched = mode(modes.PROXY) is not None or mode(modes.FAKE) is not None
    return watched or transformed() or torch._C._get_tracing_state() is not None


def in_a_graph() -> bool:
    """True where what is computed now is repeated without Python: where it is `traced`, or captured in a CUDA graph."""
    return traced() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def transformed() -> bool:
    """True inside transforms of `torch.func` and forward-mode differentiation, which only PyTorch's operators support."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x in a memory format; unchanged inside transforms, some of which support no formats."""
    if transformed():
        return x
    if memory_format == torch.channels_last and x.shape[1] == 1 and x.stride(1) != 1:
        # an image of one channel is contiguous in both formats, and convolutions take the one that its strides say
        return x.clone(memory_format=memory_format)
    return x.contiguous(memory_format=memory_format)


def in_memory(x: Tensor) -> Tensor:
    """x, or a copy if its memory does not hold its values.

    Negated tensors and tensors known to be zero are copied (`torch._neg_view`, forward-mode gradients). Raises TypeError for
    a tensor without memory of its own.
    """
    if not _is_plain(x):
        raise TypeError(
            f"a kernel reads memory, and a {type(x).__name__} tensor may have none: use backend='reference' and engine='plain'"
        )
    if x.is_neg() or x._is_zerotensor():
        return x.resolve_neg().clone()
    return x


def writable(y: Tensor) -> Tensor:
    """y, to be written to by a kernel; raise TypeError if y has no memory, or its memory does not hold its values."""
    if in_memory(y) is not y:
        raise TypeError("a kernel cannot write to a tensor with a negative bit, or to a tensor that is known to be zero")
    return y


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN or type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def is_channels_last(x: Tensor) -> bool:
    """True for an image with the channels of a pixel adjacent in memory, also for a slice of a channels-last tensor."""
    return x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous()


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor of the shape, device and layout of x: an image (B, C, H, W), or matrices.

    A kernel and the fake of its operator both allocate outputs by this function, so that the strides agree.
    `torch.empty_like` would copy the strides of a permuted or sliced x instead.
    """
    return torch.empty_like(x, dtype=dtype, memory_format=dense_format(x))


def empty_channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised image (B, C, H, W) with the channels of a pixel adjacent, on the device and in the dtype of `like`."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor in the layout of x."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
