"""Where the host may look at values: a look at a GPU's would make it wait for everything queued before."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.layout import has_memory, traced


def reading_is_free(tensor: Tensor) -> bool:
    """True if values of `tensor` may be read in a training step or a sampling pass.

    That is on the CPU only, and not where the tensor has no values yet, in a graph that is traced or under a transform of
    `torch.func`.

    All checks that look at values ask this, so that on a GPU such a pass never waits and can be captured in a CUDA graph.
    """
    return tensor.device.type == "cpu" and not traced() and has_memory(tensor)
