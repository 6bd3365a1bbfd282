"""Where the host may look at values: a look at a GPU's would make it wait for everything queued before."""

from __future__ import annotations

import torch
from torch import Tensor


def reading_is_free(tensor: Tensor) -> bool:
    """Whether values of `tensor` may be read in a training step or a sampling pass: on the CPU only, and not in a
    compiled graph, which has no values yet.

    All checks that look at values ask this, so that on a GPU such a pass never waits and can be captured in a CUDA graph.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
