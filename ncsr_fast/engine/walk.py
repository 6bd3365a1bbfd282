"""The evaluation of a level's program on a state, in either direction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine.folding import Networks
from ncsr_fast.engine.program import Head, Program, Stage
from ncsr_fast.ops.affine import affine
from ncsr_fast.ops.flow_step import folded_step
from ncsr_fast.ops.step_network import Layers, StepNetwork, evaluate_network, network_layers


class LevelTensors(NamedTuple):
    """The tensors of a program besides the state.

    Args:
        mix: (K, C, C) of every step; of the inverse maps when decoding.
        offset: (K, C), likewise.
        networks: Folded, of every branch.
        sources: Pre-activations (B, n·hidden, h, w) or (1, n·hidden, h, w), where `BranchProgram.places` finds them.
        outputs: Of every branch the outputs of all its networks, where they are known already; else None.
    """

    mix: Tensor
    offset: Tensor
    networks: tuple[Networks, ...]
    sources: tuple[Tensor, ...]
    outputs: tuple[tuple[Tensor, ...] | None, ...]


class Record(NamedTuple):
    """What a walk leaves for the backward pass and for those who watch.

    Args:
        states: The state behind the mix of every stage, which its networks read.
        peaks: The largest magnitude (B,) of the state behind every mix, NaN where it holds one; None: not wanted.
        layers: Hidden layers and output of the networks of every stage's heads; None: not wanted, they are recomputed.
    """

    states: list[Tensor]
    peaks: list[Tensor] | None = None
    layers: list[list[Layers]] | None = None


class Walk:
    """A level's program with its tensors."""

    def __init__(self, program: Program, tensors: LevelTensors) -> None:
        self.program, self.tensors, self.outputs = program, tensors, list(tensors.outputs)
        self.networks = [networks.unbind() for networks in tensors.networks]

    def evaluate_free(self, layers: list[list[Layers]] | None = None) -> None:
        """Evaluate the networks that read the condition alone and whose outputs are not known; they are from now on.

        Args:
            layers: Is appended, for every branch of such networks, their hidden layers and outputs, without autograd.
        """
        for index in free_branches(self.program, self.tensors):
            heads = [Head(index, network) for network in range(self.program.branches[index].steps)]
            if layers is None:
                self.outputs[index] = tuple(self._evaluated(head, None) for head in heads)
            else:
                layers.append([self.layers(head, None) for head in heads])
                self.outputs[index] = tuple(h for _, _, h in layers[-1])

    def run(self, x: Tensor, record: Record | None = None) -> tuple[Tensor, Tensor]:
        """The state after the program (B, C, h, w), and the log|det| (B,) of all affines.

        Conditions of one sample are shared by all of x.
        """
        logdets, deferred = [], None
        for stage in self.program.stages:
            if stage.mix is not None:
                x, logdet = self.mix(stage, x, deferred)
                logdets.append(logdet)
            x, found, deferred = self._heads(stage, x, record)
            logdets += found
        return x, torch.stack(logdets).sum(dim=0)

    def mix(self, stage: Stage, x: Tensor, deferred: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mix of a stage with the affines fused to it; `deferred` is the output that the stage before left."""
        tensors, program = self.tensors, self.program
        before = deferred if deferred is not None else self.known_output(stage.before, x)
        after = self.known_output(stage.after, x)
        mix, offset = tensors.mix[stage.mix], tensors.offset[stage.mix]
        return folded_step(x, mix, offset, before, after, program.eps, program.inverse, program.backend)

    def _heads(self, stage: Stage, x: Tensor, record: Record | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The state after a stage's heads, their log-dets, and the output that is left to the next stage."""
        if record is not None:
            record.states.append(x)
            if record.peaks is not None and stage.mix is not None:
                record.peaks.append(x.abs().amax(dim=(1, 2, 3)))
            if record.layers is not None:
                record.layers.append([])
        logdets: list[Tensor] = []
        for position, head in enumerate(stage.heads):
            h = self.output(head, x, record)
            if position == len(stage.applied):
                return x, logdets, h
            x, logdet = self.apply(head, x, h)
            logdets.append(logdet)
        return x, logdets, None

    def apply(self, head: Head, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map of a head, and its log-det."""
        program = self.program
        return affine(x, h, program.pass_through(head, x.shape[1]), program.eps, program.inverse, program.backend)

    def output(self, head: Head, x: Tensor, record: Record | None = None) -> Tensor:
        """What the network of a head shifts and scales by; its layers are appended to the record if that wants them."""
        known = self.known_output(head, x)
        if known is not None:
            return known
        if record is not None and record.layers is not None:
            record.layers[-1].append(self.layers(head, x))
            return record.layers[-1][-1][2]
        return self._evaluated(head, x)

    def _evaluated(self, head: Head, x: Tensor | None) -> Tensor:
        """The output of a head's network; x None for one that reads the condition alone."""
        tf32, backend = self.program.method.tf32, self.program.network_backend
        return evaluate_network(self.network(head), self.read(head, x), self.pre(head), tf32, backend)

    def layers(self, head: Head, x: Tensor | None) -> Layers:
        """Hidden layers and output of a head's network, without gradients; x as for its output."""
        tf32, backend = self.program.method.tf32, self.program.network_backend
        return network_layers(self.network(head), self.read(head, x), self.pre(head), tf32, backend)

    def network(self, head: Head) -> StepNetwork:
        """The weights of a head's network."""
        return self.networks[head.branch][head.network]

    def pre(self, head: Head) -> Tensor:
        """The pre-activation of a head's network."""
        place = self.program.branches[head.branch].places[head.network]
        return self.pre_activation(self.tensors.sources[place.source], head)

    def pre_activation(self, source: Tensor, head: Head) -> Tensor:
        """That part of its source, or of the gradient, which is the pre-activation of a head's network: a view."""
        branch = self.program.branches[head.branch]
        place = branch.places[head.network]
        return source if source.shape[1] == branch.hidden else source[:, place.channel : place.channel + branch.hidden]

    def read(self, head: Head, x: Tensor | None) -> Tensor | None:
        """The pass-through channels of the state, for a network that reads them; else None."""
        pass_through = 0 if x is None else self.program.pass_through(head, x.shape[1])
        return x[:, :pass_through] if x is not None and pass_through else None

    def known_output(self, head: Head | None, x: Tensor) -> Tensor | None:
        """The output of a head's network that is known already, for all samples of x."""
        outputs = None if head is None else self.outputs[head.branch]
        return None if head is None or outputs is None else outputs[head.network].expand(x.shape[0], -1, -1, -1)


def free_branches(program: Program, tensors: LevelTensors) -> list[int]:
    """The numbers of the branches that read the condition alone and whose outputs are not known."""
    return [index for index, branch in enumerate(program.branches) if branch.changes_all and tensors.outputs[index] is None]
