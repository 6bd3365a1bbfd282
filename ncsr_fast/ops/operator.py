"""The autograd wrapper of every map with a hand-written backward pass.

An eager call goes directly to the kernels, inside an `autograd.Function` if gradients are recorded, because the dispatcher
would cost as much as a small kernel. Under `torch.compile` or with fake tensors the call goes through the registered operator
`ncsr_fast::<name>` (`registration.py`), which has a schema, a fake and an autograd formula; a map that is not registered runs
its reference there, which consists of registered maps. Whatever the backend, the reference computes gradients of gradients, and
calls under `torch.func` transforms or batched gradients, whose tensors have no memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.autocast import without_autocast
from ncsr_fast.layout import has_memory, is_eager, readable, transformed
from ncsr_fast.ops.registration import Registered, Signature

Tensors = tuple[Tensor | None, ...]
Outputs = tuple[Tensor, ...]
Pair = tuple[Tensor, Tensor]


class Operator:
    """A differentiable map (tensors, *settings) → outputs, all tuples; `torch.autocast` does not affect it.

    Args:
        name: The name of the autograd node, and of the registered operator.
        forward: (tensors, *settings) → (outputs, tensors saved for the backward pass besides the inputs).
        backward: (gradients of the outputs, inputs, saved, needed, *settings) → the gradient of every input; it is ignored
            for an input that is None, or whose flag in `needed` is False.
        reference: (*tensors, *settings) → outputs, in plain PyTorch.
        signature: The types of tensors and settings, for a registered operator; the last setting is the backend.
        autograd_of_reference: True: with the backend "reference" autograd differentiates the reference. False: `forward` and
            `backward` serve that backend too.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., tuple[Outputs, Tensors]],
        backward: Callable[..., Tensors],
        reference: Callable[..., Outputs],
        signature: Signature | None = None,
        autograd_of_reference: bool = True,
    ) -> None:
        self.forward, self.backward, self.reference = forward, backward, reference
        self._registered = None if signature is None else Registered(name, signature, self)
        self._autograd_of_reference = signature is not None and autograd_of_reference
        self._function = self._make_function(name)

    def __call__(self, tensors: Tensors, *settings: Any) -> Outputs:
        given, by_pytorch = [tensor for tensor in tensors if tensor is not None], self._by_pytorch(settings)
        with without_autocast(given[0].device.type):
            if by_pytorch and self._autograd_of_reference:
                return self.reference(*tensors, *settings)
            if not readable(given, by_pytorch):
                if self._registered is None or by_pytorch or (transformed() and not torch.compiler.is_compiling()):
                    return self.reference(*tensors, *settings)
                return self._registered(tensors, settings)
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
                outputs: Outputs = self._function.apply(len(tensors), *tensors, *settings)
                return outputs
            return self.forward(tensors, *settings)[0]

    def _by_pytorch(self, settings: tuple[Any, ...]) -> bool:
        """True if `forward` and `backward` consist of PyTorch's and other operators."""
        return self._registered is None or settings[-1] == "reference"

    def _make_function(self, name: str) -> type[torch.autograd.Function]:
        def forward(ctx: Any, count: int, *arguments: Any) -> Outputs:  # a setup_context would cost 25 µs a call
            inputs, settings = arguments[:count], arguments[count:]
            outputs, saved = self.forward(inputs, *settings)
            ctx.save_for_backward(*inputs, *saved)
            ctx.count, ctx.settings = count, settings
            return outputs

        def gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # read once, because torch.utils.checkpoint recomputes them at each read
            needed = ctx.needs_input_grad[1 : ctx.count + 1]
            inputs, others = saved[: ctx.count], saved[ctx.count :]
            accepted = is_eager if self._by_pytorch(ctx.settings) else has_memory
            found = self.gradients(grads, inputs, others, needed, ctx.settings, self.backward, accepted)
            return None, *found, *([None] * len(ctx.settings))

        methods: dict[str, Callable[..., Any]] = {"forward": forward, "backward": gradient}
        return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    def gradients(
        self,
        grads: Tensors,
        inputs: Tensors,
        saved: Tensors,
        needed: tuple[bool, ...],
        settings: tuple[Any, ...],
        backward: Callable[..., Tensors],
        accepted: Callable[[Tensor], bool],
    ) -> Tensors:
        """The gradient of every input, None if not needed.

        `backward` computes them, or autograd on the reference if gradients of gradients are wanted (create_graph=True) or
        one of `grads` is not `accepted`.
        """
        given = [grad for grad in grads if grad is not None]
        with without_autocast(given[0].device.type):
            if torch.is_grad_enabled() or not all(map(accepted, given)):
                return self._gradients_of_reference(grads, inputs, needed, settings)
            found = backward(grads, inputs, saved, needed, *settings)
        return tuple(gradient if wanted else None for gradient, wanted in zip(found, needed))

    def _gradients_of_reference(
        self, grads: Tensors, inputs: Tensors, needed: tuple[bool, ...], settings: tuple[Any, ...]
    ) -> Tensors:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that an input counts as independent even if it was computed from another input
            views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
            pairs = zip(self.reference(*views, *settings), grads)
            recorded = [(output, grad) for output, grad in pairs if output is not None and output.requires_grad]
        outputs, weights = zip(*recorded)
        wanted = [view for view, need in zip(views, needed) if need and view is not None]
        found = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=create_graph, allow_unused=True))
        return tuple(next(found) if need else None for need in needed)
