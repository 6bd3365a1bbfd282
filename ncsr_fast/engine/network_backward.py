"""The backward passes of a level's networks: those of the data at once, those of the weights for several networks together.

A network that reads the state has its turn in the walk backward. One that reads the condition alone can wait, and so can the
gradients of all weights: where the backend takes several networks in one launch, they do, as many of a branch as there is
memory for. What they wait with are the layers of a network and their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.engine.deep_network import deep_gradients, hidden_layers
from ncsr_fast.engine.memory import spare_bytes
from ncsr_fast.engine.program import Head
from ncsr_fast.engine.walk import Hidden, LevelTensors, Walk, packed_weights
from ncsr_fast.layout import empty_channels_last
from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.network_gradients import NetworkPass, StepNetwork

BATCHED = ("triton",)  # backends that take several networks, or steps, in one launch


class NetworksBackward:
    """One backward pass through the networks of a level.

    Args:
        walk: The level's.
        wanted: Which gradients.
        sources: Are written the gradients of the pre-activations, where they are wanted.
        free_hidden: Hidden layers behind the first of the networks of the walk's `free` branches, or none.
    """

    def __init__(
        self, walk: Walk, wanted: LevelTensors, sources: Sequence[Tensor | None], free_hidden: list[list[Hidden]]
    ) -> None:
        self._walk, self._sources, self._free_hidden = walk, sources, free_hidden
        self._kernels, self._tf32 = kernels(walk.program.network_backend), walk.program.method.tf32
        self._needs_weights = [any(flags) for flags in wanted.networks]
        self.gradients = [
            tuple([torch.empty_like(tensor) if needed and tensor is not None else None for tensor in networks])
            for networks, needed in zip(walk.tensors.networks, self._needs_weights)
        ]
        backend = walk.program.network_backend
        stacks = [packed_weights(networks, backend, transposed=True) for networks in walk.tensors.networks]
        self._transposed = [list(zip(*map(Tensor.unbind, packed))) for packed in stacks]
        self._passes: list[list[tuple[Head, NetworkPass]]] = [[] for _ in self.gradients]
        self._waiting: list[list[tuple[Head, Tensor]]] = [[] for _ in self.gradients]

    def add(self, head: Head, x: Tensor, hidden: Hidden | None, dh: Tensor, dz1: Tensor) -> None:
        """Add the gradient of the state x that a network read to `dz1`, from its hidden layers, or with None from x alone."""
        self._backward([head], x, None if hidden is None else [hidden], [dh], [dz1])

    def add_free(self, head: Head, dh: Tensor) -> None:
        """Likewise of a network that reads the condition alone, unless its outputs were given or no gradient is wanted."""
        wanted = self._needs_weights[head.branch] or self._sources[head.source] is not None
        if wanted and head.branch in self._walk.free:
            self._waiting[head.branch].append((head, dh))
            if len(self._waiting[head.branch]) >= self._together(head, dh):
                self._run_waiting(head.branch)

    def finish(self) -> None:
        """Compute what still waits."""
        for branch in range(len(self.gradients)):
            self._run_waiting(branch)
            self._run_weights(branch)

    def _run_waiting(self, branch: int) -> None:
        waiting, self._waiting[branch] = self._waiting[branch], []
        if waiting:
            heads, dh = zip(*waiting)
            saved = self._free_hidden[self._walk.free.index(branch)] if self._free_hidden else []
            hidden = [(None, *saved[head.network]) for head in heads] if saved else None
            self._backward(heads, None, hidden, dh, [None] * len(heads))

    def _backward(
        self,
        heads: Sequence[Head],
        x: Tensor | None,
        hidden: Sequence[tuple[Tensor | None, ...]] | None,
        dh: Sequence[Tensor],
        dz1: Sequence[Tensor | None],
    ) -> None:
        """The gradients of the pre-activations and of z1, for networks of one branch; those of the weights wait."""
        branch, walk = heads[0].branch, self._walk
        if walk.is_deep(heads[0]):
            for index, head in enumerate(heads):
                self._deep_backward(head, x, hidden[index] if hidden else None, dh[index], dz1[index])
            return
        z1, pre, *weights = zip(*[walk.arguments(head, x) for head in heads])
        pre = tuple([own.expand(len(own_dh), -1, -1, -1) for own, own_dh in zip(pre, dh)])
        networks, dpre = list(map(StepNetwork, *weights)), list(map(self._place, heads, pre))
        transposed = self._transposed[branch]
        packed = [(*walk.packed(head), *transposed[head.network]) for head in heads] if transposed else []
        dh = [own.to(pre[0].dtype) for own in dh]
        backward = self._kernels.step_network_backward
        pairs = cast(Sequence[tuple[Tensor | None, Tensor]] | None, hidden)
        layers = backward(dh, z1, pre, pairs, networks, dpre, dz1, tf32=self._tf32, packed=packed)
        if self._needs_weights[branch]:
            found = zip(z1, pre, layers, dpre, dh)
            self._passes[branch] += [
                (head, NetworkPass(own_z1, own_pre, own.h1, own.h2, own_dpre, own.dh2, own_dh, own.sums))
                for head, (own_z1, own_pre, own, own_dpre, own_dh) in zip(heads, found)
            ]
            if len(self._passes[branch]) >= self._together(heads[0], dh[0]):
                self._run_weights(branch)

    def _deep_backward(
        self, head: Head, x: Tensor | None, hidden: tuple[Tensor | None, ...] | None, dh: Tensor, dz1: Tensor | None
    ) -> None:
        """All gradients of a deep network, by convolutions."""
        walk, method, network = self._walk, self._walk.program.method, self._walk.network(head)
        z1, pre, *_ = walk.arguments(head, x)
        if hidden is None and z1 is not None:
            hidden = walk.layers(head, x)[:-1]
        first, *later = cast(Hidden, hidden) if hidden else (None,)
        h1 = F.relu(pre) if first is None else first
        layers = h1, *(later or hidden_layers(h1, network, head.residual, method))
        needs_weights, dpre = self._needs_weights[head.branch], self._place(head, pre)
        found, gradients = deep_gradients(network, z1, layers, dh, needs_weights, head.residual, method, dpre)
        if dz1 is not None and found is not None:
            dz1.add_(found)
        for stack, gradient in zip(self.gradients[head.branch], gradients or ()):
            if stack is not None and gradient is not None:
                stack[head.network] = gradient

    def _place(self, head: Head, pre: Tensor) -> Tensor:
        """Where the gradient of a pre-activation is written."""
        source = self._sources[head.source]
        return empty_channels_last(pre.shape, pre) if source is None else self._walk.pre_activation(source, head)

    def _run_weights(self, branch: int) -> None:
        waiting, self._passes[branch] = self._passes[branch], []
        if waiting:
            heads, passes = zip(*waiting)
            stacks = self.gradients[branch]
            written = [StepNetwork._make(stack if stack is None else stack[head.network] for stack in stacks) for head in heads]
            self._kernels.step_network_weights_backward(passes, written, tf32=self._tf32)

    def _together(self, head: Head, dh: Tensor) -> int:
        """How many networks of a branch may wait, with hidden layers and the gradient of h2 in memory, and that of outputs."""
        if self._walk.program.network_backend not in BATCHED or self._walk.is_deep(head):
            return 1
        size = (3 * head.hidden + dh.shape[1]) * dh[:, 0].numel() * dh.element_size()
        return max(1, spare_bytes(dh.device) // max(1, size * len(self.gradients)))
