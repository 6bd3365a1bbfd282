"""How a pair of kernels becomes a differentiable function: an autograd.Function in eager calls, torch.library in compiled ones.

An eager call goes straight to the kernels: the dispatcher would cost as much as a small kernel. Under `torch.compile` or
with fake tensors the call goes through the operator `ncsr_fast::<name>`, which has a schema, a fake and an autograd formula.
What kernels cannot do, plain torch does whatever the backend: gradients of gradients, and calls under `torch.func`
transforms or batched gradients, whose tensors have no memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.autocast import without_autocast
from ncsr_fast.layout import empty_like, has_memory, traced, transformed
from ncsr_fast.ops._contract import compute_dtype

LIBRARY = torch.library.Library("ncsr_fast", "DEF")  # operators live as long as it does
Grads = tuple[Tensor | None, ...]
Registered = Tensor | tuple[Tensor, ...]


class Operator:
    """A map (x, tensors…, parameters…) → (y, logdet) with a kernel for it and one for its gradient.

    forward    (*tensors, *parameters) → (y, logdet); the first tensor is the state, a tensor may be None
    backward   (dy, dlogdet, y, *tensors, *parameters) → the gradient of every tensor, None for None; y is None unless
               `keeps_output`
    reference  like forward, in plain torch; what a gradient of the gradient is taken of

    The last parameter is the backend. `torch.autocast` touches neither the map nor its gradient.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        parameters: str,
        *,
        forward: Callable[..., tuple[Tensor, Tensor]],
        backward: Callable[..., Grads],
        reference: Callable[..., tuple[Tensor, Tensor]],
        keeps_output: bool = False,
    ) -> None:
        self.count = tensors.count(",") + 1  # of tensors
        self.forward, self.backward, self.reference, self.keeps_output = forward, backward, reference, keeps_output
        grads = ", ".join(["Tensor"] * self.count)
        LIBRARY.define(f"{name}({tensors}, {parameters}) -> (Tensor, Tensor)")
        LIBRARY.define(f"{name}_backward(Tensor dy, Tensor dlogdet, Tensor? y, {tensors}, {parameters}) -> ({grads})")
        LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
        LIBRARY.impl(f"{name}_backward", self._backward_of_library, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ncsr_fast::{name}", self._fake, lib=LIBRARY)
        torch.library.register_fake(f"ncsr_fast::{name}_backward", self._fake_backward, lib=LIBRARY)
        self._registered = getattr(torch.ops.ncsr_fast, name).default
        self._registered_backward = getattr(torch.ops.ncsr_fast, f"{name}_backward").default
        torch.library.register_autograd(f"ncsr_fast::{name}", self._gradient_of_library, setup_context=self._setup, lib=LIBRARY)
        self._function = self._make_function(name)

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        with without_autocast(arguments[0].device.type):
            return self._compute(*arguments)

    def _compute(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if arguments[-1] == "reference" or (not torch.compiler.is_compiling() and transformed()):
            return self.reference(*arguments)
        output: tuple[Tensor, Tensor]
        tensors = [tensor for tensor in arguments[: self.count] if tensor is not None]
        if traced() or not all(map(has_memory, tensors)):
            output = self._registered(*arguments)
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            output = self._function.apply(*arguments)
        else:
            output = self.forward(*arguments)
        return output

    def _make_function(self, name: str) -> type[torch.autograd.Function]:
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # a setup_context would cost 25 µs a call
            output = self.forward(*arguments)
            self._setup(ctx, arguments, output)
            return output

        def gradient(ctx: Any, dy: Tensor, dlogdet: Tensor) -> Grads:
            return self._gradient(ctx, dy, dlogdet, self.backward)

        methods: dict[str, Callable[..., Any]] = {"forward": forward, "backward": gradient}
        return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[: self.count], output[0] if self.keeps_output else None)
        ctx.parameters = inputs[self.count :]

    def _gradient(self, ctx: Any, dy: Tensor, dlogdet: Tensor, backward: Callable[..., Grads]) -> Grads:
        *tensors, y = ctx.saved_tensors
        with without_autocast(dy.device.type):
            if torch.is_grad_enabled() or not (has_memory(dy) and has_memory(dlogdet)):  # the first is create_graph=True
                grads = self._gradient_of_reference(dy, dlogdet, tensors, ctx.parameters)
            else:
                grads = backward(dy, dlogdet, y, *tensors, *ctx.parameters)
        return *grads, *([None] * len(ctx.parameters))

    def _gradient_of_library(self, ctx: Any, dy: Tensor, dlogdet: Tensor) -> Grads:
        return self._gradient(ctx, dy, dlogdet, self._through_library)

    def _gradient_of_reference(
        self, dy: Tensor, dlogdet: Tensor, tensors: list[Tensor | None], parameters: tuple[Any, ...]
    ) -> Grads:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that h counts as an input of its own where it was computed from z
            views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
            pairs = zip(self.reference(*views, *parameters), (dy, dlogdet))
        recorded = [(output, weight) for output, weight in pairs if output.requires_grad]
        outputs, weights = zip(*recorded)
        wanted = [view for view in views if view is not None and view.requires_grad]
        grads = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=create_graph))
        return tuple(next(grads) if view is not None and view.requires_grad else None for view in views)

    def _through_library(self, dy: Tensor, dlogdet: Tensor, y: Tensor | None, *arguments: Any) -> Grads:
        grads = self._registered_backward(dy, dlogdet, y, *arguments)
        grads = (grads,) if self.count == 1 else grads
        return tuple(None if tensor is None else grad for tensor, grad in zip(arguments, grads))

    def _backward_of_library(self, dy: Tensor, dlogdet: Tensor, y: Tensor | None, *arguments: Any) -> Registered:
        grads = self.backward(dy, dlogdet, y, *arguments)
        return _as_registered([dy.new_empty(0) if grad is None else grad for grad in grads])

    def _fake(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x))

    def _fake_backward(self, dy: Tensor, dlogdet: Tensor, y: Tensor | None, *arguments: Any) -> Registered:
        return _as_registered([_empty_gradient(tensor, dy) for tensor in arguments[: self.count]])


def _as_registered(grads: list[Tensor]) -> Registered:
    """Gradients as a registered operator returns them: a single one by itself."""
    return grads[0] if len(grads) == 1 else tuple(grads)


def _empty_gradient(tensor: Tensor | None, dy: Tensor) -> Tensor:
    if tensor is None:
        return dy.new_empty(0)
    return empty_like(tensor) if tensor.dim() == 4 else tensor.new_empty(tensor.shape)
