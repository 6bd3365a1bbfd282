"""The operators of a step on folded parameters, differentiable: matrix and offset instead of actnorm and 1×1 convolution."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.engine.function import Piece, Tensors
from ncsr_fast.ops._backends import implementation
from ncsr_fast.ops._reference import step_fwd


def mixed_step(
    x: Tensor,
    mix: Tensor,
    offset: Tensor,
    h_pre: Tensor | None,
    h_post: Tensor | None,
    eps: float,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`post(mix·pre(x) + offset)` (B, C, H, W) and the log|det| (B,) of pre and post alone: see `ncsr_fast.ops.flow_step`.

    Encoding, pre is a coupling and post an injector, decoding the other way round; either may be None.
    """
    return _mixed_step((x, mix, offset, h_pre, h_post), eps, inverse, backend)


def _forward(tensors: Tensors, eps: float, inverse: bool, backend: str) -> tuple[Tensors, Tensors]:
    y, logdet = implementation(backend).step_fwd(*tensors, eps, inverse)
    return (y, logdet), (y,)


def _backward(
    grads: Tensors, inputs: Tensors, kept: Tensors, _: tuple[bool, ...], eps: float, inverse: bool, backend: str
) -> Tensors:
    x, mix, _, h_pre, h_post = inputs
    return implementation(backend).step_bwd(*grads, x, *kept, mix, h_pre, h_post, eps, inverse)


def _reference(
    x: Tensor, mix: Tensor, offset: Tensor, h_pre: Tensor | None, h_post: Tensor | None, eps: float, inverse: bool, _: str
) -> Tensors:
    return step_fwd(x, mix, offset, h_pre, h_post, eps, inverse)


_mixed_step = Piece("MixedStep", forward=_forward, backward=_backward, reference=_reference)
