"""A level's program as one differentiable map with a backward pass written by hand.

The forward pass saves the state after the mix of every stage, the pre-activations and the outputs of the networks, and
without checkpointing their hidden layers. The backward pass walks the same stages from the last to the first, with
checkpointing recomputes the hidden layers of one network at a time, and writes the gradients of the pre-activations into one
tensor, so that the large convolution before them has one backward pass. It does not invert the flow: a network whose forward
pass is healthy can have an inverse that amplifies rounding by 1e15.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ncsr_fast.engine.network_backward import BATCHED, NetworksBackward
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.engine.program import Program
from ncsr_fast.engine.walk import Hidden, Layers, LevelTensors, Record, Walk
from ncsr_fast.layout import readable
from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.operator import Operator, Outputs, Pair, Tensors
from ncsr_fast.ops.protocol import Step


def level_pass(
    x: Tensor,
    tensors: LevelTensors,
    program: Program,
    checkpoint: bool,
    peaks: Peaks | None = None,
    window: tuple[slice, slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """The state after a program, and the log|det| (B,) of its affines, differentiable.

    Args:
        x: State (B, C, h, w).
        tensors: Tensors of the program; conditions with one sample are shared by all samples of x.
        program: The program.
        checkpoint: False: the hidden layers of the networks are saved, not recomputed in the backward pass.
        peaks: Are added those of the state behind every mix; only by a pass that records no gradients.
        window: Rows and columns whose log|det| is wanted; None: all. Only of a pass that records no gradients.
    """
    flat, spec = pytree.tree_flatten((x, tensors))
    given = [tensor for tensor in flat if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        if window is not None:
            raise NotImplementedError("the log-det of a window of the state has no gradients")
        y, logdet = _level_pass(tuple(flat), spec, program, checkpoint)
        return y, logdet
    return _run(x, tensors, program, not readable(given, by_pytorch=True), Record(peaks=peaks, window=window))


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
        states: Behind the mix of every stage.
        outputs: Of the networks of the walk's `free` branches, branch by branch.
        free_hidden: Hidden layers of those networks behind the first, or none.
        stage_outputs: Of the networks that every stage evaluates.
        hidden: Hidden layers of the latter, or none.
    """

    states: list[Tensor]
    outputs: list[tuple[Tensor, ...]]
    free_hidden: list[list[Hidden]]
    stage_outputs: list[list[Tensor]]
    hidden: list[list[Hidden]]


def _forward(flat: Tensors, spec: Any, program: Program, checkpoint: bool) -> tuple[Pair, Tensors]:
    x, tensors = pytree.tree_unflatten(list(flat), spec)
    free: list[list[Layers]] | None = None if checkpoint else []
    states: list[Tensor] = []
    stage_outputs: list[list[Tensor]] = []
    hidden: list[list[Hidden]] = []
    walk = Walk(program, tensors, recorded=False)
    walk.evaluate_free(free)
    output = walk.run(x, Record(states, outputs=stage_outputs, hidden=None if checkpoint else hidden))
    outputs = [walk.outputs[branch] or () for branch in walk.free]
    free_hidden = [[own[1:-1] for own in found] for found in free or []]
    return output, tuple(pytree.tree_leaves(Saved(states, outputs, free_hidden, stage_outputs, hidden)))


def _read_saved(flat: Outputs, walk: Walk, checkpoint: bool) -> Saved:
    """The inverse of flattening `Saved`."""
    left, program = iter(flat), walk.program
    counts = [len(program.heads[branch]) for branch in walk.free]
    states = [next(left) for _ in program.stages]
    outputs = [tuple(islice(left, count)) for count in counts]
    free = [] if checkpoint else [program.heads[branch] for branch in walk.free]
    free_hidden = [[tuple(islice(left, walk.layer_count(head) - 2)) for head in heads] for heads in free]
    evaluated = [[head for head in stage.evaluated if head.pass_through] for stage in program.stages]
    stage_outputs = [list(islice(left, len(heads))) for heads in evaluated]
    recorded = [] if checkpoint else evaluated
    hidden = [[tuple(islice(left, walk.layer_count(head) - 1)) for head in heads] for heads in recorded]
    return Saved(states, outputs, free_hidden, stage_outputs, hidden)


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
    packed: list[tuple[None, ...]]


class _Backward:
    """One backward pass: the gradients of the tensors, filled in from stage to stage."""

    def __init__(self, walk: Walk, saved: Saved, wanted: LevelTensors) -> None:
        self.walk, self.program, self.saved = walk, walk.program, saved
        tensors = walk.tensors
        for branch, found in zip(walk.free, saved.outputs):
            walk.outputs[branch] = found
        self.kernels = kernels(walk.program.backend)
        self.later = walk.program.backend in BATCHED  # the gradients of all mixes and offsets at once
        self.steps: list[tuple[int, Step]] = []
        sources = [torch.empty_like(source) if flag else None for source, flag in zip(tensors.sources, wanted.sources)]
        self.networks = NetworksBackward(walk, wanted, sources, saved.free_hidden)
        self.gradients = LevelGradients(
            torch.empty_like(tensors.mix),
            torch.empty_like(tensors.offset),
            self.networks.gradients,
            sources,
            [None if known is None else (None,) * len(known) for known in tensors.outputs],
            [(None,) * len(packed) for packed in tensors.packed],
        )

    def run(self, x: Tensor, dy: Tensor, dlogdet: Tensor) -> Tensor:
        """The gradient of x, from the gradients of the state after the program and of the log-det."""
        stages = self.program.stages
        ddeferred = None  # gradient of the output that a stage leaves to the next stage
        for index in reversed(range(len(stages))):
            states, outputs = self._recomputed(index)
            if index + 1 < len(stages):
                deferred = outputs[-1] if stages[index].deferred else None
                dy, ddeferred = self._mix_backward(index + 1, dy, dlogdet, states[-1], deferred)
            dy = self._heads_backward(index, dy, dlogdet, states, outputs, ddeferred)
        dx = dy if stages[0].mix is None else self._mix_backward(0, dy, dlogdet, x, None)[0]
        self.networks.finish()
        if self.steps:
            steps = [step for _, step in sorted(self.steps, key=lambda numbered: numbered[0])]
            mix, offset = self.kernels.flow_step_mix_backward(steps, self.program.eps, self.program.inverse)
            self.gradients = self.gradients._replace(mix=mix, offset=offset)
        return dx

    def _recomputed(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """The states that the heads of a stage read, that behind them, and the outputs of their networks."""
        stage, states = self.program.stages[index], [self.saved.states[index]]
        is_last = index + 1 == len(self.program.stages)  # no mix reads the state after its heads
        applied = stage.heads[:-1] if is_last else stage.heads
        saved, program = iter(self.saved.stage_outputs[index]), self.program
        outputs: list[Tensor] = []
        for head in stage.evaluated:
            x = states[-1]
            h = next(saved) if head.pass_through else self.walk.output(head, x)
            outputs.append(h)
            if len(states) <= len(applied):
                states.append(self.kernels.affine_forward(x, h, head.pass_through, program.eps, program.inverse)[0])
        return states, outputs

    def _mix_backward(
        self, index: int, dy: Tensor, dlogdet: Tensor, x: Tensor, deferred: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the output `deferred` that the stage before left; those of the stage's own affines go on."""
        program, stage, y = self.program, self.program.stages[index], self.saved.states[index]
        before, after = self.walk.fused(stage.before, x, deferred), self.walk.fused(stage.after, x)
        dx, dmix, doffset, dbefore, dafter = self.kernels.flow_step_backward(
            dy, dlogdet, x, y, self.walk.tensors.mix[stage.mix], before, after, program.eps, program.inverse, self.later
        )
        if dmix is None or doffset is None:
            assert stage.mix is not None
            self.steps.append((stage.mix, (dy, x, before, after)))
        else:
            self.gradients.mix[stage.mix], self.gradients.offset[stage.mix] = dmix, doffset
        if stage.after is not None and dafter is not None:
            self.networks.add_free(stage.after, dafter)
        if stage.before is not None and dbefore is not None and deferred is None:
            self.networks.add_free(stage.before, dbefore)
        return dx, dbefore

    def _heads_backward(
        self,
        index: int,
        dy: Tensor,
        dlogdet: Tensor,
        states: list[Tensor],
        outputs: list[Tensor],
        ddeferred: Tensor | None,
    ) -> Tensor:
        """The gradient of the state after a stage's mix."""
        program, stage = self.program, self.program.stages[index]
        hidden = list(self.saved.hidden[index]) if self.saved.hidden else []
        for head, x, h in reversed(list(zip(stage.evaluated, states, outputs))):
            if head is stage.deferred and ddeferred is not None:
                dh = ddeferred
            else:
                dy, dh = self.kernels.affine_backward(dy, dlogdet, x, h, head.pass_through, program.eps, program.inverse)
            if head.pass_through:
                self.networks.add(head, x, hidden.pop() if hidden else None, dh, dy[:, : head.pass_through])
            else:
                self.networks.add_free(head, dh)
        return dy


_level_pass = Operator("LevelPass", forward=_forward, backward=_backward, reference=_reference)
