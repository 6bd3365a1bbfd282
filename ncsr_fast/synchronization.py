"""When the host may read values: reading values on a GPU makes the host wait for all queued work."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.layout import has_memory, traced


def reading_is_free(tensor: Tensor) -> bool:
    """True if values of `tensor` may be read in a training step or a sampling pass.

    This is so on the CPU only, and only for a tensor with values: not in a graph that is traced, nor under a transform of
    `torch.func`.

    Every check that reads values asks this function first, so that on a GPU a pass never waits and can be captured in a CUDA
    graph.
    """
    return tensor.device.type == "cpu" and not traced() and has_memory(tensor)
