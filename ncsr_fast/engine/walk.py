"""The evaluation of a level's program on a state, in either direction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ncsr_fast.engine.deep_network import deep_layers, deep_network
from ncsr_fast.engine.folding import Networks, is_deep
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.engine.program import Head, Link, Program
from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.contract import compute_dtype
from ncsr_fast.ops.coupled_step import Mixing, Step, coupled_step, mapped, peaks, total
from ncsr_fast.ops.network_gradients import StepNetwork
from ncsr_fast.ops.protocol import Kernels
from ncsr_fast.ops.recorded import RecordedKernels
from ncsr_fast.ops.reference import affine_logdet
from ncsr_fast.ops.step_network import NetworkTensors, network_weights

Hidden = tuple[Tensor, ...]  # layers of a network: two, or those of a deep one
Layers = tuple[Tensor, ...]  # hidden layers of a network, then its output


class LevelTensors(NamedTuple):
    """The tensors of a program besides the state.

    Args:
        mix: (K, C, C), the mixes of all steps; in decoding of the inverse maps.
        offset: (K, C), the offsets of all steps; in decoding of the inverse maps.
        networks: The folded networks of every branch.
        sources: Pre-activations (B, n·hidden, h, w) or (1, n·hidden, h, w), where the heads find them.
        outputs: For every branch the outputs of all its networks if already computed, else None.
        packed: Of every branch the weights of all its networks as their backend reads them: `packed_weights`.
    """

    mix: Tensor
    offset: Tensor
    networks: tuple[Networks, ...]
    sources: tuple[Tensor, ...]
    outputs: tuple[tuple[Tensor, ...] | None, ...]
    packed: tuple[tuple[Tensor, ...], ...]


class Record(NamedTuple):
    """The tensors that a walk records for the backward pass and for watching the state.

    Args:
        states: The state after the mix of every stage, which its networks read; None: not recorded.
        peaks: Of the state behind every mix; None: not wanted.
        outputs: Of the networks that every stage evaluates; None: not wanted.
        hidden: Hidden layers of those networks; None: not wanted.
        window: Rows and columns of the state whose log-det is wanted, all but the halo of a tile; None: all. When encoding.
    """

    states: list[Tensor] | None = None
    peaks: Peaks | None = None
    outputs: list[list[Tensor]] | None = None
    hidden: list[list[Hidden]] | None = None
    window: tuple[slice, slice] | None = None


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
        self._coupled = coupled_step(program.backend, program.network_backend, recorded)
        self._weights = [networks.unbind() for networks in tensors.networks]
        self._packed = [list(zip(*map(Tensor.unbind, packed))) for packed in tensors.packed]
        heads = zip(program.heads, self.outputs)
        # branches that read the condition alone and whose outputs are not yet computed
        self.free = [branch for branch, (own, known) in enumerate(heads) if known is None and not own[0].pass_through]

    def run(self, x: Tensor, record: Record | None = None) -> tuple[Tensor, Tensor]:
        """The state after the program (B, C, h, w), and the log|det| (B,) of all affines."""
        logdets: list[Tensor] = []
        found: list[Tensor] = []  # peaks
        record = record or Record()
        if record.window is not None:
            logdets.append(x.new_zeros(x.shape[0], dtype=compute_dtype(x)))
        if self.program.stages[0].mix is None:
            _enter(record, x)
        for link in self.program.links:
            step = self._step(link, x, record)
            x = step.y
            logdets += step.logdets
            if step.peak is not None:
                found.append(step.peak)
            if link.mix is not None:
                _enter(record, x)
                if record.peaks is not None and step.peak is None:
                    record.peaks.add(x)
        if record.peaks is not None and found:
            record.peaks.extend(peaks(found))
        return x, total(logdets)

    def _step(self, link: Link, x: Tensor, record: Record) -> Step:
        """The maps of a link, with the evaluation of its network if that reads the state."""
        program, head, mixing = self.program, link.head, self._mixing(link, x)
        if record.window is not None:
            return self._windowed(link, x, mixing, record.window)
        # a part of the state is watched by itself
        watched = record.peaks is not None and record.peaks.is_whole and link.mix is not None
        known = head is None or self.outputs[head.branch] is not None
        if head is None or known or record.hidden is not None or self.is_deep(head):
            h, pass_through = (None, 0) if head is None else (self.output(head, x, record), head.pass_through)
            return mapped(self._maps, x, h, pass_through, mixing, program.eps, program.inverse, watched)
        network, packed, with_output = self.arguments(head, x)[1:], self.packed(head), record.outputs is not None
        options = {"tf32": program.method.tf32, "packed": packed, "watched": watched, "with_output": with_output}
        step = Step(*self._coupled(x, *network, *mixing, program.eps, program.inverse, **options))
        if record.outputs is not None and step.output is not None:
            record.outputs[-1].append(step.output)
        return step

    def _windowed(self, link: Link, x: Tensor, mixing: Mixing, window: tuple[slice, slice]) -> Step:
        """The maps of a link, with the log|det| of a window of the state."""
        program, head = self.program, link.head
        h, pass_through = (None, 0) if head is None else (self.output(head, x), head.pass_through)
        step = mapped(self._maps, x, h, pass_through, mixing, program.eps, program.inverse, watched=False)
        outputs = [each[(..., *window)].to(compute_dtype(x)) for each in (h, mixing.injector) if each is not None]
        return step._replace(logdets=tuple(affine_logdet(each, program.eps).expand(x.shape[0]) for each in outputs))

    def _mixing(self, link: Link, x: Tensor) -> Mixing:
        if link.mix is None:
            return Mixing()
        return Mixing(self.tensors.mix[link.mix], self.tensors.offset[link.mix], self.fused(link.injector, x))

    def evaluate_free(self, layers: list[list[Layers]] | None = None) -> None:
        """Evaluate the networks of the branches `free`; their outputs are known from now on.

        Args:
            layers: Output list. If given, the hidden layers and outputs of the networks are appended for every such branch.
        """
        for branch in self.free:
            heads = self.program.heads[branch]
            if layers is None and not self.is_deep(heads[0]):
                own, source = heads[0], self.tensors.sources[heads[0].source]
                pre = source[:, own.channel : own.channel + len(heads) * own.hidden]  # the networks' are next to each other
                _, *weights = self.tensors.networks[branch]
                tails, packed = self._networks.step_network_tails, self.tensors.packed[branch]
                self.outputs[branch] = tails(pre, *weights, tf32=self.program.method.tf32, packed=packed)
            elif layers is None:
                self.outputs[branch] = tuple(self._evaluated(head, None) for head in heads)
            else:
                layers.append([self.layers(head, None) for head in heads])
                self.outputs[branch] = tuple(found[-1] for found in layers[-1])

    def output(self, head: Head, x: Tensor, record: Record | None = None) -> Tensor:
        """The output of a head's network for all samples of x; it is appended to a record that wants it, as are its layers."""
        known = self.outputs[head.branch]
        if known is not None:
            return known[head.network].expand(x.shape[0], -1, -1, -1)
        if record is None or record.hidden is None:
            h = self._evaluated(head, x)
        else:
            *hidden, h = self.layers(head, x)
            record.hidden[-1].append(tuple(hidden))
        if record is not None and record.outputs is not None:
            record.outputs[-1].append(h)
        return h

    def fused(self, head: Head | None, x: Tensor, deferred: Tensor | None = None) -> Tensor | None:
        """The output for an affine fused to a mix: `deferred` by the stage before, or computed; None without a head."""
        return deferred if head is None or deferred is not None else self.output(head, x)

    def layers(self, head: Head, x: Tensor | None) -> Layers:
        """Hidden layers and output of a head's network, where nothing is recorded; x None for one of a `free` branch."""
        arguments, program = self.arguments(head, x), self.program
        if self.is_deep(head):
            return deep_layers(arguments[0], arguments[1], self.network(head), head.residual, program.method)
        layers = kernels(program.network_backend).step_network_layers
        return layers(*arguments, tf32=program.method.tf32, packed=self.packed(head))

    def layer_count(self, head: Head) -> int:
        """The number of `layers`."""
        if not self.is_deep(head):
            return 3
        count = len(self.network(head).w2)
        return 2 + count + (count // head.residual if head.residual else 0)

    def is_deep(self, head: Head) -> bool:
        """True for a head whose network is a deep one."""
        return is_deep(self.tensors.networks[head.branch].w2)

    def _evaluated(self, head: Head, x: Tensor | None) -> Tensor:
        arguments, method = self.arguments(head, x), self.program.method
        if self.is_deep(head):
            return deep_network(arguments[0], arguments[1], self.network(head), head.residual, method)
        return self._networks.step_network_forward(*arguments, tf32=method.tf32, packed=self.packed(head))

    def arguments(self, head: Head, x: Tensor | None) -> NetworkTensors:
        """The pass-through channels, for a network that reads them, the pre-activation, of as many samples, and the weights."""
        network, pre = self.network(head), self.pre_activation(self.tensors.sources[head.source], head)
        if x is None or not head.pass_through:
            return (None, pre, *network)
        return (x[:, : head.pass_through], pre.expand(x.shape[0], -1, -1, -1), *network)

    def network(self, head: Head) -> StepNetwork:
        """The weights of a head's network."""
        return self._weights[head.branch][head.network]

    def packed(self, head: Head) -> tuple[Tensor, ...]:
        """The same weights as the networks' backend reads them, or nothing."""
        packed = self._packed[head.branch]
        return packed[head.network] if packed else ()

    def pre_activation(self, source: Tensor, head: Head) -> Tensor:
        """A view of the part of `source`, or of its gradient, that is the pre-activation of a head's network."""
        return source if source.shape[1] == head.hidden else source[:, head.channel : head.channel + head.hidden]


def packed_weights(networks: Networks, backend: str, transposed: bool = False) -> tuple[Tensor, ...]:
    """`network_weights` of folded networks; nothing for deep ones, which are convolved layer by layer."""
    return () if is_deep(networks.w2) else network_weights(networks.w1, networks.w2, networks.w3, backend, transposed)


def _enter(record: Record, x: Tensor) -> None:
    """Begin a stage, whose networks read x."""
    if record.states is not None:
        record.states.append(x)
    for found in (record.outputs, record.hidden):
        if found is not None:
            found.append([])
