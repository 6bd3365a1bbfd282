"""The evaluation of a level's program on a state, in either direction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine.folding import Networks
from ncsr_fast.engine.program import Head, Program
from ncsr_fast.ops.backend import Kernels, kernels
from ncsr_fast.ops.recorded import RecordedKernels
from ncsr_fast.ops.step_network import Layers, NetworkTensors, StepNetwork


class LevelTensors(NamedTuple):
    """The tensors of a program besides the state.

    Args:
        mix: (K, C, C), the mixes of all steps; in decoding of the inverse maps.
        offset: (K, C), the offsets of all steps; in decoding of the inverse maps.
        networks: The folded networks of every branch.
        sources: Pre-activations (B, n·hidden, h, w) or (1, n·hidden, h, w), where the heads find them.
        outputs: For every branch the outputs of all its networks if already computed, else None.
    """

    mix: Tensor
    offset: Tensor
    networks: tuple[Networks, ...]
    sources: tuple[Tensor, ...]
    outputs: tuple[tuple[Tensor, ...] | None, ...]


class Record(NamedTuple):
    """The tensors that a walk records for the backward pass and for watching the state.

    Args:
        states: The state after the mix of every stage, which its networks read; None: not recorded.
        peaks: The largest magnitude (B,) of the state after every mix, NaN if it contains NaN; None: not recorded.
        layers: Hidden layers and output of the networks that every stage evaluates; None: not recorded.
    """

    states: list[Tensor] | None = None
    peaks: list[Tensor] | None = None
    layers: list[list[Layers]] | None = None


class Walk:
    """A level's program with its tensors.

    Args:
        program: The program.
        tensors: Its tensors; conditions of one sample are shared by all samples of the state.
        recorded: True: autograd or a traced graph records the kernels. False: kernels are called on memory.
    """

    def __init__(self, program: Program, tensors: LevelTensors, recorded: bool) -> None:
        self.program, self.tensors, self.outputs = program, tensors, list(tensors.outputs)
        called = RecordedKernels if recorded else kernels
        self._maps: Kernels | RecordedKernels = called(program.backend)
        self._networks: Kernels | RecordedKernels = called(program.network_backend)
        self._weights = [networks.unbind() for networks in tensors.networks]
        heads = zip(program.heads, self.outputs)
        # branches that read the condition alone and whose outputs are not yet computed
        self.free = [branch for branch, (own, known) in enumerate(heads) if known is None and not own[0].pass_through]

    def run(self, x: Tensor, record: Record | None = None) -> tuple[Tensor, Tensor]:
        """The state after the program (B, C, h, w), and the log|det| (B,) of all affines."""
        program, (mix, offset, *_) = self.program, self.tensors
        logdets: list[Tensor] = []
        deferred = None
        for stage in program.stages:
            if stage.mix is not None:
                before, after = self.fused(stage.before, x, deferred), self.fused(stage.after, x)
                x, logdet = self._maps.flow_step_forward(
                    x, mix[stage.mix], offset[stage.mix], before, after, program.eps, program.inverse
                )
                logdets.append(logdet)
            if record is not None:
                _enter(record, x, stage.mix is not None)
            for head in stage.heads:
                h = self.output(head, x, record)
                x, logdet = self._maps.affine_forward(x, h, head.pass_through, program.eps, program.inverse)
                logdets.append(logdet)
            deferred = None if stage.deferred is None else self.output(stage.deferred, x, record)
        return x, torch.stack(logdets).sum(dim=0)

    def evaluate_free(self, layers: list[list[Layers]] | None = None) -> None:
        """Evaluate the networks of the branches `free`; their outputs are known from now on.

        Args:
            layers: Output list. If given, the hidden layers and outputs of the networks are appended for every such branch.
        """
        for branch in self.free:
            heads = self.program.heads[branch]
            if layers is None:
                self.outputs[branch] = tuple(self._evaluated(head, None) for head in heads)
            else:
                layers.append([self.layers(head, None) for head in heads])
                self.outputs[branch] = tuple(h for _, _, h in layers[-1])

    def output(self, head: Head, x: Tensor, record: Record | None = None) -> Tensor:
        """The output of a head's network for all samples of x; its layers are appended to a record that wants them."""
        known = self.outputs[head.branch]
        if known is not None:
            return known[head.network].expand(x.shape[0], -1, -1, -1)
        if record is None or record.layers is None:
            return self._evaluated(head, x)
        layers = self.layers(head, x)
        record.layers[-1].append(layers)
        return layers[2]

    def fused(self, head: Head | None, x: Tensor, deferred: Tensor | None = None) -> Tensor | None:
        """The output for an affine fused to a mix: `deferred` by the stage before, or computed; None without a head."""
        return deferred if head is None or deferred is not None else self.output(head, x)

    def layers(self, head: Head, x: Tensor | None) -> Layers:
        """Hidden layers and output of a head's network, where nothing is recorded; x None for one of a `free` branch."""
        program = self.program
        return kernels(program.network_backend).step_network_layers(*self._arguments(head, x), tf32=program.method.tf32)

    def _evaluated(self, head: Head, x: Tensor | None) -> Tensor:
        return self._networks.step_network_forward(*self._arguments(head, x), tf32=self.program.method.tf32)

    def _arguments(self, head: Head, x: Tensor | None) -> NetworkTensors:
        """The pass-through channels, for a network that reads them, the pre-activation, of as many samples, and the weights."""
        network, pre = self.network(head), self.pre_activation(self.tensors.sources[head.source], head)
        if x is None or not head.pass_through:
            return (None, pre, *network)
        return (x[:, : head.pass_through], pre.expand(x.shape[0], -1, -1, -1), *network)

    def network(self, head: Head) -> StepNetwork:
        """The weights of a head's network."""
        return self._weights[head.branch][head.network]

    def pre_activation(self, source: Tensor, head: Head) -> Tensor:
        """A view of the part of `source`, or of its gradient, that is the pre-activation of a head's network."""
        return source if source.shape[1] == head.hidden else source[:, head.channel : head.channel + head.hidden]


def _enter(record: Record, x: Tensor, mixed: bool) -> None:
    """Record the state after the mix of a stage."""
    if record.states is not None:
        record.states.append(x)
    if record.peaks is not None and mixed:
        record.peaks.append(x.abs().amax(dim=(1, 2, 3)))
    if record.layers is not None:
        record.layers.append([])
