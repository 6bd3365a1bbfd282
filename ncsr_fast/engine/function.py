"""A differentiable piece with a backward pass written by hand, and plain PyTorch where that cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.autocast import without_autocast
from ncsr_fast.layout import is_eager, traced

Tensors = tuple[Tensor | None, ...]


class Piece:
    """A map (tensors, *settings) → tensors; a tensor may be None. `torch.autocast` touches neither it nor its gradient.

    forward    (tensors, *settings) → (outputs, what the backward pass needs beside the inputs)
    backward   (gradients of the outputs, inputs, what forward kept, needed, *settings) → gradient of every input, None where
               it is not `needed`
    reference  (*tensors, *settings) → outputs in plain PyTorch: for gradients of gradients, `torch.func` transforms, batched
               gradients, and `torch.compile`, which fuses it itself
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., tuple[Tensors, Tensors]],
        backward: Callable[..., Tensors],
        reference: Callable[..., Tensors],
    ) -> None:
        self.forward, self.backward, self.reference = forward, backward, reference
        self._function = self._make_function(name)

    def __call__(self, tensors: Tensors, *settings: Any) -> Tensors:
        given = [tensor for tensor in tensors if tensor is not None]
        with without_autocast(given[0].device.type):
            return self._compute(tensors, given, settings)

    def _compute(self, tensors: Tensors, given: list[Tensor], settings: tuple[Any, ...]) -> Tensors:
        if traced() or not all(map(is_eager, given)):
            return self.reference(*tensors, *settings)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            return self._function.apply(len(tensors), *tensors, *settings)
        return self.forward(tensors, *settings)[0]

    def _make_function(self, name: str) -> type[torch.autograd.Function]:
        def forward(ctx: Any, count: int, *arguments: Any) -> Tensors:
            inputs, settings = arguments[:count], arguments[count:]
            outputs, kept = self.forward(inputs, *settings)
            ctx.save_for_backward(*inputs, *kept)
            ctx.count, ctx.settings = count, settings
            return outputs

        def gradient(ctx: Any, *grads: Tensor) -> Tensors:
            saved = ctx.saved_tensors  # once: torch.utils.checkpoint computes them anew for it
            inputs, kept = saved[: ctx.count], saved[ctx.count :]
            needed = ctx.needs_input_grad[1 : ctx.count + 1]
            with without_autocast(grads[0].device.type):
                if torch.is_grad_enabled() or not all(map(is_eager, grads)):  # the first is create_graph=True
                    found = self._gradient_of_reference(grads, inputs, needed, ctx.settings)
                else:
                    found = self.backward(grads, inputs, kept, needed, *ctx.settings)
            return None, *found, *([None] * len(ctx.settings))

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
        return type(name, (torch.autograd.Function,), methods)

    def _gradient_of_reference(self, grads: Tensors, inputs: Tensors, needed: tuple[bool, ...], settings: tuple) -> Tensors:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that an input counts as one of its own where it was computed from another
            views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
            pairs = [pair for pair in zip(self.reference(*views, *settings), grads) if pair[0].requires_grad]
        outputs, weights = zip(*pairs)
        wanted = [view for view, need in zip(views, needed) if need]
        found = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=create_graph, allow_unused=True))
        return tuple(next(found) if need else None for need in needed)
