"""How a pair of kernels becomes a differentiable function: an autograd.Function in eager calls, torch.library in compiled ones.

An eager call goes straight to the kernels: the dispatcher would cost as much as a small kernel. Under `torch.compile` or
with fake tensors the call goes through the operator `ncsr_fast::<name>`, which has a schema, a fake and an autograd formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.layout import empty_like

LIBRARY = torch.library.Library("ncsr_fast", "DEF")  # operators live as long as it does
_PLAIN = (Tensor, torch.nn.Parameter)
Grads = tuple[Tensor | None, ...]


class Operator:
    """A map (x, tensors…, parameters…) → (y, logdet) with a kernel for it and one for its gradient.

    forward    (*tensors, *parameters) → (y, logdet); the first tensor is the state, a tensor may be None
    backward   (dy, dlogdet, y, *tensors, *parameters) → the gradient of every tensor, None for None; y is None unless
               `keeps_output`
    reference  like forward, in plain torch; what a gradient of the gradient is taken of
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
        LIBRARY.define(
            f"{name}_backward(Tensor dy, Tensor dlogdet, Tensor? y, {tensors}, {parameters}) -> ({grads})"
        )
        LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
        LIBRARY.impl(f"{name}_backward", self._backward_of_library, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ncsr_fast::{name}", self._fake, lib=LIBRARY)
        torch.library.register_fake(f"ncsr_fast::{name}_backward", self._fake_backward, lib=LIBRARY)
        self._registered = getattr(torch.ops.ncsr_fast, name).default
        self._registered_backward = getattr(torch.ops.ncsr_fast, f"{name}_backward").default
        torch.library.register_autograd(
            f"ncsr_fast::{name}", self._gradient_of_library, setup_context=self._setup, lib=LIBRARY
        )
        self._function = self._make_function(name)

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors = [tensor for tensor in arguments[: self.count] if tensor is not None]
        if torch.compiler.is_compiling() or any(type(tensor) not in _PLAIN for tensor in tensors):
            return self._registered(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self._function.apply(*arguments)
        return self.forward(*arguments)

    def _make_function(self, name: str) -> type[torch.autograd.Function]:
        def gradient(ctx: Any, dy: Tensor, dlogdet: Tensor) -> Grads:
            return self._gradient(ctx, dy, dlogdet, self.backward)

        methods = {"forward": self.forward, "setup_context": self._setup, "backward": gradient}
        return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[: self.count], output[0] if self.keeps_output else None)
        ctx.parameters = inputs[self.count :]

    def _gradient(self, ctx: Any, dy: Tensor, dlogdet: Tensor, backward: Callable[..., Grads]) -> Grads:
        *tensors, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: only plain torch has gradients of gradients
            grads = self._gradient_of_reference(dy, dlogdet, tensors, ctx.parameters)
        else:
            grads = backward(dy, dlogdet, y, *tensors, *ctx.parameters)
        return *grads, *([None] * len(ctx.parameters))

    def _gradient_of_library(self, ctx: Any, dy: Tensor, dlogdet: Tensor) -> Grads:
        return self._gradient(ctx, dy, dlogdet, self._through_library)

    def _gradient_of_reference(self, dy: Tensor, dlogdet: Tensor, tensors: list[Tensor | None], parameters: tuple) -> Grads:
        wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        outputs = self.reference(*tensors, *parameters)
        grads = iter(torch.autograd.grad(outputs, wanted, (dy, dlogdet), create_graph=True))
        return tuple(next(grads) if tensor is not None and tensor.requires_grad else None for tensor in tensors)

    def _through_library(self, dy: Tensor, dlogdet: Tensor, y: Tensor | None, *arguments: Any) -> Grads:
        grads = self._registered_backward(dy, dlogdet, y, *arguments)
        return tuple(None if tensor is None else grad for tensor, grad in zip(arguments, grads))

    def _backward_of_library(self, dy: Tensor, dlogdet: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        grads = self.backward(dy, dlogdet, y, *arguments)
        return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)

    def _fake(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return empty_like(x), x.new_empty(x.shape[0], dtype=dtype)

    def _fake_backward(self, dy: Tensor, dlogdet: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_empty_gradient(tensor, dy) for tensor in arguments[: self.count])


def _empty_gradient(tensor: Tensor | None, dy: Tensor) -> Tensor:
    if tensor is None:
        return dy.new_empty(0)
    return empty_like(tensor) if tensor.dim() == 4 else tensor.new_empty(tensor.shape)
