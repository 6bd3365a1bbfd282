"""The contract of a backend: the functions that it has, and their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ncsr_fast.ops.plain_dense_blocks import DenseBlocks

if TYPE_CHECKING:
    from ncsr_fast.ops.network_gradients import Layers, NetworkPass, StepNetwork

Step = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # dy, x, h_before and h_after of `flow_step_backward`


class Kernels(Protocol):
    """The functions of a backend, of checked tensors and without autograd, each documented in `ncsr_fast.ops.reference`.

    The reference has all of them; what the others have, on which devices and in which dtypes, says
    `ncsr_fast.ops.backend.COVERAGE`.
    """

    def affine_forward(self, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]: ...

    def affine_backward(
        self, dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool
    ) -> tuple[Tensor, Tensor]: ...

    def gaussian_split_forward(self, x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]: ...

    def gaussian_split_backward(
        self, dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]: ...

    def flow_step_forward(
        self,
        x: Tensor,
        mix: Tensor,
        offset: Tensor,
        h_before: Tensor | None,
        h_after: Tensor | None,
        eps: float,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def flow_step_backward(
        self,
        dy: Tensor,
        dlogdet: Tensor,
        x: Tensor,
        y: Tensor,
        mix: Tensor,
        h_before: Tensor | None,
        h_after: Tensor | None,
        eps: float,
        inverse: bool,
        mix_later: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...

    def flow_step_mix_backward(self, steps: Sequence[Step], eps: float, inverse: bool) -> tuple[Tensor, Tensor]: ...

    def inverse_logdet(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def fold_forward(
        self,
        name: str,
        bias: Tensor,
        logs: Tensor,
        weight: Tensor,
        inverse: bool,
        dtype: torch.dtype,
        needs_logdet: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def fold_backward(
        self, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dmix: Tensor, doffset: Tensor, dlogdet: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def fold_filters_forward(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        logs: Sequence[Tensor],
        factors: Sequence[float],
        first: Sequence[int],
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...

    def fold_filters_backward(
        self,
        dfirst: Sequence[Tensor],
        drest: Sequence[Tensor],
        dfolded: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        logs: Sequence[Tensor],
        factors: Sequence[float],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...

    def conv3x3_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        upsample2x: bool = False,
        slope: float = 1.0,
        tf32: bool = False,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor: ...

    def conv3x3_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        needed: tuple[bool, bool, bool],
        *,
        upsample2x: bool = False,
        relu: tuple[Tensor, float] | None = None,
        tf32: bool = False,
        dx: Tensor | None = None,
        dweight: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...

    def conv3x3_weights(self, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]: ...

    def dense_blocks_forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        blocks: DenseBlocks,
        *,
        tf32: bool = False,
        saves: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]: ...

    def dense_blocks_backward(
        self,
        grads: Sequence[Tensor],
        saved: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        blocks: DenseBlocks,
        needed: tuple[bool, bool],
        *,
        tf32: bool = False,
    ) -> tuple[Tensor | None, list[Tensor]]: ...

    def hoisted_forward(
        self, own: Tensor, stacked: Tensor, weight: Tensor, bias: Tensor, *, groups: int = 1, tf32: bool = False
    ) -> list[Tensor]: ...

    def hoisted_backward(
        self,
        dy: Tensor,
        own: Tensor,
        stacked: Tensor,
        weight: Tensor,
        needed: tuple[bool, bool, bool],
        *,
        tf32: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...

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
    ) -> Tensor: ...

    def step_network_layers(
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
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def step_network_backward(
        self,
        dh: Sequence[Tensor],
        z1: Sequence[Tensor | None],
        pre: Sequence[Tensor],
        hidden: Sequence[tuple[Tensor | None, Tensor]] | None,
        networks: Sequence[StepNetwork],
        dpre: Sequence[Tensor],
        dz1: Sequence[Tensor | None],
        *,
        tf32: bool = False,
        packed: Sequence[Sequence[Tensor]] = (),
    ) -> list[Layers]: ...

    def step_network_weights_backward(
        self, passes: Sequence[NetworkPass], gradients: Sequence[StepNetwork], *, tf32: bool = False
    ) -> None: ...

    def step_network_coupled(
        self,
        x: Tensor,
        pre: Tensor,
        w1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        mix: Tensor | None,
        offset: Tensor | None,
        injector: Tensor | None,
        eps: float,
        inverse: bool,
        *,
        tf32: bool = False,
        packed: Sequence[Tensor] = (),
        watched: bool = False,
        with_output: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]: ...

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
    ) -> tuple[Tensor, ...]: ...

    def step_network_weights(
        self, w1: Tensor | None, w2: Tensor, w3: Tensor, dtype: torch.dtype, transposed: bool = False
    ) -> tuple[Tensor, ...]: ...
