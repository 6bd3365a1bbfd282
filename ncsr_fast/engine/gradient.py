"""A level's program as one differentiable map with a backward pass written by hand.

The forward pass saves the state behind the mix of every stage, the pre-activations and the outputs of the injectors, and
without checkpointing the hidden layers of the networks. The backward pass walks the same stages from the last to the first,
with checkpointing recomputes the hidden layers of one stage's networks at a time, and writes the gradients of the
pre-activations into one tensor, so that the large convolution before them has one backward pass. It does not invert the flow:
a network whose forward pass is healthy can have an inverse that amplifies rounding by 1e15.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ncsr_fast.engine.folding import Networks
from ncsr_fast.engine.program import Head, Program, Stage
from ncsr_fast.engine.walk import LevelTensors, Record, Walk, free_branches
from ncsr_fast.ops.backends import kernels
from ncsr_fast.ops.conv3x3 import convolution_forward
from ncsr_fast.ops.operator import Operator, Outputs, Pair, Tensors
from ncsr_fast.ops.step_network import Layers, StepNetwork, network_gradients


def level_pass(
    x: Tensor, tensors: LevelTensors, program: Program, checkpoint: bool, peaks: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The state after a program, and the log|det| (B,) of its affines. Differentiable.

    Args:
        x: State (B, C, h, w).
        tensors: Of the program; those of one sample are shared by all of x.
        program: What is computed.
        checkpoint: False: the hidden layers of the networks are saved, not recomputed in the backward pass.
        peaks: Is appended the largest magnitude (B,) of the state behind every mix, NaN where it holds one; only for a pass
            that records no gradients.
    """
    flat, spec = pytree.tree_flatten((x, tensors))
    if peaks is not None and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat)):
        return _run(x, tensors, program, Record([], peaks))
    y, logdet = _level_pass(tuple(flat), spec, program, checkpoint)
    return y, logdet


def _reference(*arguments: Any) -> Pair:
    *flat, spec, program, _ = arguments
    x, tensors = pytree.tree_unflatten(flat, spec)
    return _run(x, tensors, program, None)


def _run(x: Tensor, tensors: LevelTensors, program: Program, record: Record | None) -> Pair:
    walk = Walk(program, tensors)
    walk.evaluate_free()
    return walk.run(x, record)


class Saved(NamedTuple):
    """What the forward pass saves besides its inputs.

    Args:
        states: Behind the mix of every stage.
        outputs: Of the networks of `free_branches`, branch by branch.
        free_h2: Second hidden layers of those networks, or none.
        layers: Hidden layers and output of the networks of every stage's heads, or none.
    """

    states: list[Tensor]
    outputs: list[tuple[Tensor, ...]]
    free_h2: list[list[Tensor]]
    layers: list[list[Layers]]


def _forward(flat: Tensors, spec: Any, program: Program, checkpoint: bool) -> tuple[Pair, Tensors]:
    x, tensors = pytree.tree_unflatten(list(flat), spec)
    free: list[list[Layers]] | None = None if checkpoint else []
    walk = Walk(program, tensors)
    walk.evaluate_free(free)
    record = Record([], layers=None if checkpoint else [])
    output = walk.run(x, record)
    outputs = [walk.outputs[index] or () for index in free_branches(program, tensors)]
    free_h2 = [[h2 for _, h2, _ in found] for found in free or []]
    return output, tuple(pytree.tree_leaves(Saved(record.states, outputs, free_h2, record.layers or [])))


def _read_saved(flat: Outputs, program: Program, free: list[int], checkpoint: bool) -> Saved:
    """The inverse of flattening `Saved`."""
    left = iter(flat)
    counts = [program.branches[index].steps for index in free]
    states = [next(left) for _ in program.stages]
    outputs = [tuple(next(left) for _ in range(count)) for count in counts]
    if checkpoint:
        return Saved(states, outputs, [], [])
    free_h2 = [[next(left) for _ in range(count)] for count in counts]
    evaluated = [[head for head in stage.heads if program.reads_state(head)] for stage in program.stages]
    return Saved(states, outputs, free_h2, [[(next(left), next(left), next(left)) for _ in heads] for heads in evaluated])


def _backward(
    grads: Pair, flat: Tensors, saved: Outputs, needed: tuple[bool, ...], spec: Any, program: Program, checkpoint: bool
) -> Tensors:
    x, tensors = pytree.tree_unflatten(list(flat), spec)
    _, wanted = pytree.tree_unflatten(list(needed), spec)
    free = free_branches(program, tensors)
    backward = _Backward(program, tensors, _read_saved(saved, program, free, checkpoint), free, wanted)
    dx = backward.run(x, *grads)
    return tuple(pytree.tree_leaves((dx, backward.gradients)))


class LevelGradients(NamedTuple):
    """Gradients of `LevelTensors`, None where they are not wanted."""

    mix: Tensor
    offset: Tensor
    networks: tuple[tuple[Tensor | None, ...], ...]
    sources: tuple[Tensor | None, ...]
    outputs: tuple[tuple[None, ...] | None, ...]


class _Backward:
    """One backward pass: the gradients of the tensors, filled in from stage to stage."""

    def __init__(self, program: Program, tensors: LevelTensors, saved: Saved, free: list[int], wanted: LevelTensors) -> None:
        self.program, self.saved, self.free, self.wanted = program, saved, free, wanted
        self.walk = Walk(program, tensors)
        for index, found in zip(free, saved.outputs):
            self.walk.outputs[index] = found
        self.kernels = kernels(program.backend)
        self.gradients = LevelGradients(
            torch.empty_like(tensors.mix),
            torch.empty_like(tensors.offset),
            tuple(_empty(networks, flags) for networks, flags in zip(tensors.networks, wanted.networks)),
            tuple(torch.empty_like(s) if flag else None for s, flag in zip(tensors.sources, wanted.sources)),
            tuple(None if known is None else (None,) * len(known) for known in tensors.outputs),
        )

    def run(self, x: Tensor, dy: Tensor, dlogdet: Tensor) -> Tensor:
        """The gradient of x, from those of the state after the program and of the log-det."""
        stages = self.program.stages
        ddeferred = None  # gradient of the output that a stage left to the one behind
        for index in reversed(range(len(stages))):
            states, layers = self._recomputed(index)
            if index + 1 < len(stages):
                deferred = layers[stages[index].heads[-1]][2] if stages[index].deferred else None
                dy, ddeferred = self._mix_backward(stages[index + 1], dy, dlogdet, states[-1], index + 1, deferred)
            dy = self._heads_backward(stages[index], dy, dlogdet, states, layers, ddeferred)
        return dy if stages[0].mix is None else self._mix_backward(stages[0], dy, dlogdet, x, 0, None)[0]

    def _recomputed(self, index: int) -> tuple[list[Tensor], dict[Head, Layers]]:
        """The states before each head of a stage and before the next stage's mix, and the layers of the heads' networks."""
        stage, states = self.program.stages[index], [self.saved.states[index]]
        last = index + 1 == len(self.program.stages)  # no mix reads the state behind its last head
        saved = iter(self.saved.layers[index] if self.saved.layers else ())
        layers: dict[Head, Layers] = {}
        for position, head in enumerate(stage.heads):
            if self.program.reads_state(head):
                layers[head] = next(saved) if self.saved.layers else self.walk.layers(head, states[-1])
                h = layers[head][2]
            else:
                h = self.walk.output(head, states[-1])
            if position < len(stage.applied) - last:
                states.append(self._applied(head, states[-1], h))
        return states, layers

    def _applied(self, head: Head, x: Tensor, h: Tensor) -> Tensor:
        program = self.program
        return self.kernels.affine_forward(x, h, program.pass_through(head, x.shape[1]), program.eps, program.inverse)[0]

    def _mix_backward(
        self, stage: Stage, dy: Tensor, dlogdet: Tensor, x: Tensor, index: int, deferred: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the output `deferred` that the stage before left; those of the stage's own affines go on."""
        program, tensors, y = self.program, self.walk.tensors, self.saved.states[index]
        before = deferred if deferred is not None else self.walk.known_output(stage.before, x)
        after = self.walk.known_output(stage.after, x)
        dx, dmix, doffset, dbefore, dafter = self.kernels.flow_step_backward(
            dy, dlogdet, x, y, tensors.mix[stage.mix], before, after, program.eps, program.inverse
        )
        self.gradients.mix[stage.mix], self.gradients.offset[stage.mix] = dmix, doffset
        if stage.after is not None and dafter is not None:
            self._free_backward(stage.after, dafter)
        if stage.before is not None and dbefore is not None and deferred is None:
            self._free_backward(stage.before, dbefore)
        return dx, dbefore

    def _heads_backward(
        self,
        stage: Stage,
        dy: Tensor,
        dlogdet: Tensor,
        states: list[Tensor],
        layers: dict[Head, Layers],
        ddeferred: Tensor | None,
    ) -> Tensor:
        """The gradient of the state behind a stage's mix."""
        program = self.program
        for position in reversed(range(len(stage.heads))):
            head, x = stage.heads[position], states[position]
            if position == len(stage.applied) and ddeferred is not None:
                dh = ddeferred
            else:
                h = layers[head][2] if head in layers else self.walk.output(head, x)
                pass_through = program.pass_through(head, x.shape[1])
                dy, dh = self.kernels.affine_backward(dy, dlogdet, x, h, pass_through, program.eps, program.inverse)
            if head in layers:
                h1, h2, _ = layers[head]
                dz1 = self._network_backward(head, self.walk.read(head, x), h1, h2, dh)
                if dz1 is not None:
                    dy[:, : dz1.shape[1]].add_(dz1)
            else:
                self._free_backward(head, dh)
        return dy

    def _free_backward(self, head: Head, dh: Tensor) -> None:
        """Gradients of a network that reads the condition alone, unless its outputs were given or none is wanted."""
        source = self.program.branches[head.branch].places[head.network].source if head.branch in self.free else None
        if source is None or not (self._needs_weights(head.branch) or self.wanted.sources[source]):
            return
        h1 = F.relu(self.walk.pre(head))
        if self.saved.free_h2:
            h2 = self.saved.free_h2[self.free.index(head.branch)][head.network]
        else:  # without the output, which is saved
            network = self.walk.network(head)
            h2 = F.relu(convolution_forward(h1, network.w2, network.b2, self.program.method))
        self._network_backward(head, None, h1, h2, dh)

    def _needs_weights(self, branch: int) -> bool:
        """Whether a gradient of the networks of a branch is wanted."""
        return any(self.wanted.networks[branch])

    def _network_backward(self, head: Head, z1: Tensor | None, h1: Tensor, h2: Tensor, dh: Tensor) -> Tensor | None:
        """The gradient of z1; those of the pre-activation and of the weights are stored."""
        program, (branch, number) = self.program, head
        source = program.branches[branch].places[number].source
        dsource = self.gradients.sources[source]
        dpre = torch.empty_like(h1) if dsource is None else self.walk.pre_activation(dsource, head)
        network, needs_weights = self.walk.network(head), self._needs_weights(branch)
        dz1, dnetwork = network_gradients(network, z1, h1, h2, dh, needs_weights, program.method, dpre)
        _store(self.gradients.networks[branch], dnetwork, number)
        return dz1


def _empty(networks: Networks, wanted: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Room for the gradients of stacked networks."""
    return tuple(torch.empty_like(t) if any(wanted) and t is not None else None for t in networks)


def _store(stacked: tuple[Tensor | None, ...], gradients: StepNetwork | None, index: int) -> None:
    if gradients is None:
        return
    for stack, gradient in zip(stacked, gradients):
        if stack is not None and gradient is not None:
            stack[index] = gradient


_level_pass = Operator("LevelPass", forward=_forward, backward=_backward, reference=_reference)
