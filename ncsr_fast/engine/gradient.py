"""A level's program as one differentiable map with a backward pass written by hand.

The forward pass saves the state after the mix of every stage, the pre-activations and the outputs of the injectors, and
without checkpointing the hidden layers of the networks. The backward pass walks the same stages from the last to the first,
with checkpointing recomputes the hidden layers of one stage's networks at a time, and writes the gradients of the
pre-activations into one tensor, so that the large convolution before them has one backward pass. It does not invert the flow:
a network whose forward pass is healthy can have an inverse that amplifies rounding by 1e15.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ncsr_fast.engine.folding import Networks
from ncsr_fast.engine.program import Head, Program, Stage
from ncsr_fast.engine.walk import LevelTensors, Record, Walk
from ncsr_fast.layout import readable
from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.conv3x3 import convolution_forward
from ncsr_fast.ops.operator import Operator, Outputs, Pair, Tensors
from ncsr_fast.ops.step_network import Layers, network_gradients


def level_pass(
    x: Tensor, tensors: LevelTensors, program: Program, checkpoint: bool, peaks: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The state after a program, and the log|det| (B,) of its affines, differentiable.

    Args:
        x: State (B, C, h, w).
        tensors: Tensors of the program; conditions with one sample are shared by all samples of x.
        program: The program.
        checkpoint: False: the hidden layers of the networks are saved, not recomputed in the backward pass.
        peaks: Output list. If given and no gradients are recorded, the largest magnitude (B,) of the state after every mix is
            appended (NaN if the state contains NaN).
    """
    flat, spec = pytree.tree_flatten((x, tensors))
    given = [tensor for tensor in flat if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        y, logdet = _level_pass(tuple(flat), spec, program, checkpoint)
        return y, logdet
    return _run(x, tensors, program, not readable(given, by_pytorch=True), None if peaks is None else Record(peaks=peaks))


def _run(x: Tensor, tensors: LevelTensors, program: Program, recorded: bool, record: Record | None) -> Pair:
    walk = Walk(program, tensors, recorded)
    walk.evaluate_free()
    return walk.run(x, record)


def _reference(*arguments: Any) -> Pair:
    *flat, spec, program, _ = arguments
    x, tensors = pytree.tree_unflatten(flat, spec)
    return _run(x, tensors, program, True, None)


class Saved(NamedTuple):
    """The tensors that the forward pass saves besides its inputs.

    Args:
        states: States after the mix of every stage.
        outputs: Outputs of the networks of the walk's `free` branches, branch by branch.
        free_h2: Second hidden layers of the networks of the `free` branches, or none.
        layers: Hidden layers and outputs of the networks that every stage evaluates, or none.
    """

    states: list[Tensor]
    outputs: list[tuple[Tensor, ...]]
    free_h2: list[list[Tensor]]
    layers: list[list[Layers]]


def _forward(flat: Tensors, spec: Any, program: Program, checkpoint: bool) -> tuple[Pair, Tensors]:
    x, tensors = pytree.tree_unflatten(list(flat), spec)
    free: list[list[Layers]] | None = None if checkpoint else []
    states: list[Tensor] = []
    layers: list[list[Layers]] = []
    walk = Walk(program, tensors, recorded=False)
    walk.evaluate_free(free)
    output = walk.run(x, Record(states, layers=None if checkpoint else layers))
    outputs = [walk.outputs[branch] or () for branch in walk.free]
    free_h2 = [[h2 for _, h2, _ in found] for found in free or []]
    return output, tuple(pytree.tree_leaves(Saved(states, outputs, free_h2, layers)))


def _read_saved(flat: Outputs, walk: Walk, checkpoint: bool) -> Saved:
    """The inverse of flattening `Saved`."""
    left, program = iter(flat), walk.program
    counts = [len(program.heads[branch]) for branch in walk.free]
    states = [next(left) for _ in program.stages]
    outputs = [tuple(islice(left, count)) for count in counts]
    if checkpoint:
        return Saved(states, outputs, [], [])
    free_h2 = [list(islice(left, count)) for count in counts]
    evaluated = [[head for head in stage.evaluated if head.pass_through] for stage in program.stages]
    return Saved(states, outputs, free_h2, [[(next(left), next(left), next(left)) for _ in heads] for heads in evaluated])


def _backward(
    grads: Pair, flat: Tensors, saved: Outputs, needed: tuple[bool, ...], spec: Any, program: Program, checkpoint: bool
) -> Tensors:
    x, tensors = pytree.tree_unflatten(list(flat), spec)
    _, wanted = pytree.tree_unflatten(list(needed), spec)
    walk = Walk(program, tensors, recorded=False)
    backward = _Backward(walk, _read_saved(saved, walk, checkpoint), wanted)
    dx = backward.run(x, *grads)
    return tuple(pytree.tree_leaves((dx, backward.gradients)))


class LevelGradients(NamedTuple):
    """Gradients of `LevelTensors`; None if not needed."""

    mix: Tensor
    offset: Tensor
    networks: list[tuple[Tensor | None, ...]]
    sources: list[Tensor | None]
    outputs: list[tuple[None, ...] | None]


class _Backward:
    """One backward pass: the gradients of the tensors, filled in from stage to stage."""

    def __init__(self, walk: Walk, saved: Saved, wanted: LevelTensors) -> None:
        self.walk, self.program, self.saved, self.wanted = walk, walk.program, saved, wanted
        tensors = walk.tensors
        for branch, found in zip(walk.free, saved.outputs):
            walk.outputs[branch] = found
        self.kernels = kernels(walk.program.backend)
        self.needs_weights = [any(flags) for flags in wanted.networks]
        self.gradients = LevelGradients(
            torch.empty_like(tensors.mix),
            torch.empty_like(tensors.offset),
            [_empty(networks, flags) for networks, flags in zip(tensors.networks, self.needs_weights)],
            [torch.empty_like(source) if flag else None for source, flag in zip(tensors.sources, wanted.sources)],
            [None if known is None else (None,) * len(known) for known in tensors.outputs],
        )

    def run(self, x: Tensor, dy: Tensor, dlogdet: Tensor) -> Tensor:
        """The gradient of x, from the gradients of the state after the program and of the log-det."""
        stages = self.program.stages
        ddeferred = None  # gradient of the output that a stage leaves to the next stage
        for index in reversed(range(len(stages))):
            states, layers = self._recomputed(index)
            if index + 1 < len(stages):
                deferred = layers[-1][2] if stages[index].deferred and layers[-1] else None
                dy, ddeferred = self._mix_backward(index + 1, dy, dlogdet, states[-1], deferred)
            dy = self._heads_backward(stages[index], dy, dlogdet, states, layers, ddeferred)
        return dy if stages[0].mix is None else self._mix_backward(0, dy, dlogdet, x, None)[0]

    def _recomputed(self, index: int) -> tuple[list[Tensor], list[Layers | None]]:
        """The states that a stage's heads read, the state after the heads, and the networks' layers (None for `free`)."""
        stage, states = self.program.stages[index], [self.saved.states[index]]
        is_last = index + 1 == len(self.program.stages)  # no mix reads the state after its heads
        applied = stage.heads[:-1] if is_last else stage.heads
        saved = iter(self.saved.layers[index] if self.saved.layers else ())
        layers: list[Layers | None] = []
        for head in stage.evaluated:
            x = states[-1]
            found = None
            if head.pass_through:
                found = next(saved) if self.saved.layers else self.walk.layers(head, x)
            layers.append(found)
            if len(states) <= len(applied):
                states.append(self._applied(head, x, found))
        return states, layers

    def _output(self, head: Head, x: Tensor, layers: Layers | None) -> Tensor:
        """The output of a head's network for the state x."""
        return self.walk.output(head, x) if layers is None else layers[2]

    def _applied(self, head: Head, x: Tensor, layers: Layers | None) -> Tensor:
        h, program = self._output(head, x, layers), self.program
        return self.kernels.affine_forward(x, h, head.pass_through, program.eps, program.inverse)[0]

    def _mix_backward(
        self, index: int, dy: Tensor, dlogdet: Tensor, x: Tensor, deferred: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the output `deferred` that the stage before left; those of the stage's own affines go on."""
        program, stage, y = self.program, self.program.stages[index], self.saved.states[index]
        before, after = self.walk.fused(stage.before, x, deferred), self.walk.fused(stage.after, x)
        dx, dmix, doffset, dbefore, dafter = self.kernels.flow_step_backward(
            dy, dlogdet, x, y, self.walk.tensors.mix[stage.mix], before, after, program.eps, program.inverse
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
        layers: list[Layers | None],
        ddeferred: Tensor | None,
    ) -> Tensor:
        """The gradient of the state after a stage's mix."""
        program = self.program
        for head, x, found in reversed(list(zip(stage.evaluated, states, layers))):
            if head is stage.deferred and ddeferred is not None:
                dh = ddeferred
            else:
                h = self._output(head, x, found)
                dy, dh = self.kernels.affine_backward(dy, dlogdet, x, h, head.pass_through, program.eps, program.inverse)
            if found is None:
                self._free_backward(head, dh)
                continue
            dz1 = self._network_backward(head, x[:, : head.pass_through], found[0], found[1], dh)
            if dz1 is not None:
                dy[:, : head.pass_through].add_(dz1)
        return dy

    def _free_backward(self, head: Head, dh: Tensor) -> None:
        """Gradients of a network that reads the condition alone, unless its outputs were given or none is wanted."""
        free = self.walk.free
        if head.branch not in free or not (self.needs_weights[head.branch] or self.wanted.sources[head.source]):
            return
        h1 = F.relu(self.walk.pre_activation(self.walk.tensors.sources[head.source], head))
        if self.saved.free_h2:
            h2 = self.saved.free_h2[free.index(head.branch)][head.network]
        else:  # without the output, which is saved
            network = self.walk.network(head)
            h2 = F.relu(convolution_forward(h1, network.w2, network.b2, self.program.method))
        self._network_backward(head, None, h1, h2, dh)

    def _network_backward(self, head: Head, z1: Tensor | None, h1: Tensor, h2: Tensor, dh: Tensor) -> Tensor | None:
        """The gradient of z1; the gradients of the pre-activation and of the weights are stored."""
        dsource, needs_weights = self.gradients.sources[head.source], self.needs_weights[head.branch]
        dpre = torch.empty_like(h1) if dsource is None else self.walk.pre_activation(dsource, head)
        network = self.walk.network(head)
        dz1, dnetwork = network_gradients(network, z1, h1, h2, dh, needs_weights, self.program.method, dpre)
        for stack, gradient in zip(self.gradients.networks[head.branch], dnetwork or ()):
            if stack is not None and gradient is not None:
                stack[head.network] = gradient
        return dz1


def _empty(networks: Networks, wanted: bool) -> tuple[Tensor | None, ...]:
    """Uninitialised gradients of stacked networks."""
    return tuple([torch.empty_like(t) if wanted and t is not None else None for t in networks])


_level_pass = Operator("LevelPass", forward=_forward, backward=_backward, reference=_reference)
