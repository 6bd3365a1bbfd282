"""What the tests of `conv3x3`, `step_network` and `fold` share: arguments, the maps from their definitions, and the cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import installation
import pytest
import torch
import torch.nn.functional as F
from operator_cases import ROUNDING, interpreted, marked, where
from torch import Tensor

from ncsr_fast import ops

Tensors = list[Tensor | None]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """A way to call an operator.

    Args:
        operator: Its name.
        tensors: The names of its tensors, in their order.
        make: (channels, outputs, size, batch, draw) → the tensors, which `draw` makes of normal numbers.
        formula: (*tensors, **options) → the outputs, from the definition.
        options: The other arguments.
        without: Names of tensors that are None.
    """

    operator: str
    tensors: tuple[str, ...]
    make: Callable[..., dict[str, Tensor]]
    formula: Callable[..., Outputs]
    options: dict[str, bool] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[o, p] = Σ weight[o, c, d]·x[c, p + d] + bias[o], zeros around x."""
    side, (height, width) = weight.shape[-1], x.shape[2:]
    padded = F.pad(x, [side // 2] * 4)
    y = x.new_zeros(x.shape[0], weight.shape[0], height, width)
    for row in range(side):
        for column in range(side):
            y = y + torch.einsum(
                "oc,bchw->bohw", weight[..., row, column], padded[..., row : row + height, column : column + width]
            )
    return y if bias is None else y + bias[:, None, None]


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, upsample2x: bool = False) -> Outputs:
    if upsample2x:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return (convolved(x, weight, bias),)


def step_network(z1: Tensor | None, pre: Tensor, w1: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Outputs:
    h1 = (pre if z1 is None else pre + convolved(z1.to(pre.dtype), w1)).clamp(min=0)
    return (convolved(convolved(h1, w2, b2).clamp(min=0), w3, b3),)


def fold(bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool = False) -> Outputs:
    """mix and offset such that mix·x + offset is weight·((x + bias)·exp(logs)) or its inverse, and the log-det."""
    logdet = logs.sum(dim=1) + torch.linalg.slogdet(weight)[1]
    if inverse:
        return torch.linalg.inv(weight) / logs.exp()[:, :, None], -bias, -logdet
    mix = weight * logs.exp()[:, None, :]
    return mix, torch.einsum("noc,nc->no", mix, bias), logdet


def _convolution_tensors(channels: int, outputs: int, size: tuple[int, int], batch: int, draw: Callable[..., Tensor]) -> dict:
    weight = draw(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    return {"x": draw(batch, channels, *size), "weight": weight, "bias": draw(outputs)}


def _network_tensors(channels: int, outputs: int, size: tuple[int, int], batch: int, draw: Callable[..., Tensor]) -> dict:
    hidden = channels + 3
    return {
        "z1": draw(batch, channels, *size), "pre": draw(batch, hidden, *size),
        "w1": draw(hidden, channels, 3, 3) / (9 * channels) ** 0.5, "w2": draw(hidden, hidden, 1, 1) / hidden**0.5,
        "b2": 0.5 + draw(hidden), "w3": draw(outputs, hidden, 3, 3) / (9 * hidden) ** 0.5, "b3": draw(outputs),
    }  # fmt: skip


def _fold_tensors(channels: int, _: int, __: tuple[int, int], batch: int, draw: Callable[..., Tensor]) -> dict:
    weight = draw(batch, channels, channels)
    rotations = torch.linalg.qr(weight)[0] if weight.numel() else weight
    return {
        "bias": draw(batch, channels),
        "logs": 0.3 * draw(batch, channels),
        "weight": rotations + 0.1 / channels * draw(batch, channels, channels),
    }


_CONVOLUTION = "conv3x3", ("x", "weight", "bias"), _convolution_tensors, conv3x3
_NETWORK = "step_network", ("z1", "pre", "w1", "w2", "b2", "w3", "b3"), _network_tensors, step_network
_FOLD = "fold", ("bias", "logs", "weight"), _fold_tensors, fold
CALLS = {
    "conv3x3": Call(*_CONVOLUTION),
    "conv3x3-without-bias": Call(*_CONVOLUTION, without=("bias",)),
    "conv3x3-upsample2x": Call(*_CONVOLUTION, {"upsample2x": True}),
    "step_network": Call(*_NETWORK),
    "step_network-without-z1": Call(*_NETWORK, without=("z1", "w1")),
    "fold": Call(*_FOLD),
    "fold-inverse": Call(*_FOLD, {"inverse": True}),
}
calls = pytest.mark.parametrize("name", CALLS)


# written out: a backend that loses an operator must be missed
HAVE = {
    "conv3x3": {("cpu", "native"), ("cpu", "triton"), ("cuda", "triton")},
    "step_network": {("cpu", "native"), ("cpu", "triton"), ("cuda", "triton")},
    "fold": {("cpu", "native")},
}


def has(operator: str, device: str, backend: str) -> bool:
    """Whether a backend has an operator on a device, the reference all of them."""
    return backend == "reference" or (device, backend) in HAVE[operator]


def cells_of(operator: str) -> pytest.MarkDecorator:
    """Decorator of a test of an operator on all devices and backends that have it."""
    of_it = [cell for cell in installation.cells() if has(operator, *cell)]
    return pytest.mark.parametrize("device, backend", [pytest.param(*cell, id="-".join(cell)) for cell in of_it])


def cells(test: Callable) -> Callable:
    """Decorator of a test of a call of `CALLS`, its argument `name`, on all devices and backends that have the operator."""
    every = [pytest.param(*cell, id="-".join(cell)) for cell in installation.cells()]
    there = where(lambda name, device, backend: has(CALLS[name].operator, device, backend))
    # in the interpreter, slowly: the call of each operator without options, which runs the same kernel
    chosen = marked("exhaustive", lambda name, backend: interpreted(backend) and name != CALLS[name].operator)
    return chosen(there(pytest.mark.parametrize("device, backend", every)(test)))


def arguments(
    name: str, channels: int = 5, outputs: int = 4, size=(3, 4), batch: int = 2, dtype=torch.float64, device: str = "cpu"
) -> Tensors:
    """The tensors of a call, None where the call is without one."""
    generator, call = torch.Generator().manual_seed(channels), CALLS[name]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = call.make(channels, outputs, size, batch, draw)
    return [None if each in call.without else made[each].to(device, dtype) for each in call.tensors]


def run(name: str, *tensors: Tensor | None, backend: str = "auto") -> Outputs:
    """The outputs of the operator."""
    call = CALLS[name]
    found = getattr(ops, call.operator)(*tensors, **call.options, backend=backend)
    return found if isinstance(found, tuple) else (found,)


def formula(name: str, *tensors: Tensor | None) -> Outputs:
    """The outputs by the definition, of float64 copies of the tensors."""
    call = CALLS[name]
    return call.formula(*(None if x is None else x.double() for x in tensors), **call.options)


def given(tensors: Tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def differentiable(tensors: Tensors) -> Tensors:
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


def weights_of(outputs: Outputs) -> list[Tensor]:
    """Random gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in outputs]


def gradients(outputs: Outputs, weights: list[Tensor], tensors: Tensors) -> list[Tensor]:
    """Of all tensors, from these gradients of the outputs."""
    weights = [weight.to(output.dtype) for weight, output in zip(weights, outputs)]
    return list(torch.autograd.grad(outputs, given(tensors), weights))


def tolerance(name: str, dtype: torch.dtype) -> float:
    """What rounding may do to a result, beside its largest element.

    In float32 F(4×4, 3×3) enlarges the errors of the sums by a factor of up to 24.5/3 (tests/native/test_conv3x3.py). A network
    rounds three layers. `fold` computes in float64 whatever the dtype.
    """
    if CALLS[name].operator == "fold":
        return ROUNDING[torch.float64]
    enlarged = 24.5 / 3 if dtype == torch.float32 and CALLS[name].operator == "conv3x3" else 1
    return ROUNDING[dtype] * enlarged * (3 if CALLS[name].operator == "step_network" else 1)
