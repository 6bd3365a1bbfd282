"""The kernels of a level's pass as operators, for passes recorded by autograd or a traced graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from torch import Tensor

from ncsr_fast.ops.affine import affine
from ncsr_fast.ops.flow_step import folded_step
from ncsr_fast.ops.step_network import StepNetwork, evaluate_network


class RecordedKernels:
    """Functions of `ncsr_fast.ops.protocol.Kernels` as operators, for a resolved backend."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def affine_forward(self, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
        return affine(x, h, pass_through, eps, inverse, self._backend)

    def flow_step_forward(
        self,
        x: Tensor,
        mix: Tensor,
        offset: Tensor,
        h_before: Tensor | None,
        h_after: Tensor | None,
        eps: float,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        return folded_step(x, mix, offset, h_before, h_after, eps, inverse, self._backend)

    def step_network_forward(
        self,
        z1: Tensor | None,
        pre: Tensor,
        w1: Tensor | None,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        *,
        tf32: bool = False,
        packed: Sequence[Tensor] = (),
    ) -> Tensor:
        return evaluate_network(StepNetwork(w1, w2, b2, w3, b3), z1, pre, tf32, self._backend)

    def step_network_tails(
        self,
        pre: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        *,
        tf32: bool = False,
        packed: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        networks = zip(pre.chunk(len(w2), dim=1), map(StepNetwork, repeat(None), w2, b2, w3, b3))
        return tuple([evaluate_network(network, None, own, tf32, self._backend) for own, network in networks])
