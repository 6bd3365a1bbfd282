"""Registration of operators with `torch.library`, by schema, fake and autograd formula, for compiled calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ncsr_fast.layout import dense_format, empty_like, is_wrapped
from ncsr_fast.ops.contract import compute_dtype

if TYPE_CHECKING:
    from ncsr_fast.ops.operator import Operator, Outputs, Tensors

LIBRARY = torch.library.Library("ncsr_fast", "DEF")  # operators exist as long as this object


def state_and_logdet(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs of a map of the state x: y in the layout of x, and a log-det (B,)."""
    return empty_like(x), x.new_empty(x.shape[0], dtype=compute_dtype(x))


class Signature(NamedTuple):
    """The description of an operator for `torch.library`.

    Args:
        tensors: Types and names of the tensors, as in a schema: "Tensor z, Tensor? h".
        settings: Types and names of the settings: "float eps, bool inverse, str backend".
        fake: (*tensors, *settings) → outputs of the right shape, dtype and strides, uninitialised.
        outputs: Number of the outputs.
        saved: Numbers of the outputs that the backward pass reads; `Operator.forward` saves these and no other tensors.
    """

    tensors: str
    settings: str
    fake: Callable[..., tuple[Tensor, ...]] = state_and_logdet
    outputs: int = 2
    saved: tuple[int, ...] = ()

    @property
    def tensor_count(self) -> int:
        """The number of tensors."""
        return self.tensors.count(",") + 1


class Registered:
    """The operators `ncsr_fast::NAME` and `ncsr_fast::NAME_backward` of an `Operator`."""

    def __init__(self, name: str, signature: Signature, operator: Operator) -> None:
        self._signature, self._operator = signature, operator
        backward = f"{name}_backward"
        outputs = ", ".join(["Tensor"] * signature.outputs)
        grads = ", ".join(f"Tensor grad{index}" for index in range(signature.outputs))
        saved = "".join(f"Tensor saved{index}, " for index in signature.saved)
        LIBRARY.define(f"{name}({signature.tensors}, {signature.settings}) -> ({outputs})")
        LIBRARY.define(f"{backward}({grads}, {saved}{signature.tensors}, bool[] needed, {signature.settings}) -> Tensor[]")
        LIBRARY.impl(name, self._forward, "CompositeExplicitAutograd")
        LIBRARY.impl(backward, self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ncsr_fast::{name}", self._fake, lib=LIBRARY)
        torch.library.register_fake(f"ncsr_fast::{backward}", self._fake_backward, lib=LIBRARY)
        self._call = getattr(torch.ops.ncsr_fast, name).default
        self._call_backward = getattr(torch.ops.ncsr_fast, backward).default
        torch.library.register_autograd(f"ncsr_fast::{name}", self._gradient, setup_context=self._setup, lib=LIBRARY)

    def __call__(self, tensors: Tensors, settings: tuple[Any, ...]) -> Outputs:
        return self._outputs(self._call(*tensors, *settings))

    def _outputs(self, output: Any) -> Outputs:
        """The outputs of a call as a tuple; `output` is not a tuple if there is one output."""
        return (output,) if self._signature.outputs == 1 else tuple(output)

    def _forward(self, *arguments: Any) -> Any:
        count = self._signature.tensor_count
        outputs, _ = self._operator.forward(arguments[:count], *arguments[count:])
        return outputs[0] if len(outputs) == 1 else outputs

    def _fake(self, *arguments: Any) -> Any:
        outputs = self._signature.fake(*arguments)
        return outputs[0] if len(outputs) == 1 else outputs

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count, outputs = self._signature.tensor_count, self._outputs(output)
        ctx.save_for_backward(*inputs[:count], *(outputs[index] for index in self._signature.saved))
        ctx.settings = inputs[count:]

    def _gradient(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count = self._signature.tensor_count
        inputs, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needed = tuple(ctx.needs_input_grad[:count])
        found = self._operator.gradients(grads, inputs, saved, needed, ctx.settings, self._through_library, _is_dispatched)
        return *found, *([None] * len(ctx.settings))

    def _through_library(self, grads: Tensors, inputs: Tensors, saved: Tensors, needed: Any, *settings: Any) -> Tensors:
        found = iter(self._call_backward(*grads, *saved, *inputs, list(needed), *settings))
        return tuple(next(found) if wanted else None for wanted in needed)

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Any, Any, Any, list[bool], Any]:
        """The gradients, saved outputs, inputs, needed and settings in a call of the backward operator."""
        first = self._signature.outputs
        second = first + len(self._signature.saved)
        third = second + self._signature.tensor_count
        return arguments[:first], arguments[first:second], arguments[second:third], arguments[third], arguments[third + 1 :]

    def _backward(self, *arguments: Any) -> list[Tensor]:
        """The needed gradients, with the strides of `_fake_backward`, on which compiled code relies."""
        grads, saved, inputs, needed, settings = self._split(arguments)
        found = self._operator.backward(grads, inputs, saved, tuple(needed), *settings)
        return [
            _lying_like(cast(Tensor, gradient), tensor) for gradient, tensor, wanted in zip(found, inputs, needed) if wanted
        ]

    def _fake_backward(self, *arguments: Any) -> list[Tensor]:
        _, _, inputs, needed, _ = self._split(arguments)
        return [_empty_gradient(tensor) for tensor, wanted in zip(inputs, needed) if wanted]


def _is_dispatched(gradient: Tensor) -> bool:
    """True if the dispatcher passes a gradient, even without memory, to a registered operator, as in a traced graph."""
    return not is_wrapped(gradient)


def _lying_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient in the layout of `_empty_gradient`; a copy if a kernel wrote another layout."""
    return gradient.contiguous(memory_format=dense_format(tensor))


def _empty_gradient(tensor: Tensor) -> Tensor:
    return empty_like(tensor) if tensor.dim() == 4 else tensor.new_empty(tensor.shape)
