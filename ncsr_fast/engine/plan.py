"""Plans of levels: for one condition, parameters are folded, algorithms chosen, and the hoisted parts computed once.

The plan then maps states, any number of times, with or without gradients. If gradients of the condition or of the level's
parameters are recorded, the pre-activations of all networks are one tensor, whose gradient the level's backward pass fills in.
If not, the plan also computes the outputs of the injectors, which all samples share.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ncsr_fast import ops
from ncsr_fast.autocast import without_autocast
from ncsr_fast.config import Branch
from ncsr_fast.engine.cache import Cache
from ncsr_fast.engine.condition import Features, resized_noise
from ncsr_fast.engine.deep_network import deep_network
from ncsr_fast.engine.folding import (
    Hoisted,
    Mixing,
    NetworkParameters,
    Networks,
    fold_level,
    fold_mixing,
    fold_zeros_convolution,
    is_deep,
)
from ncsr_fast.engine.gradient import level_pass
from ncsr_fast.engine.hoisting import HoistedWeight, algorithm, hoisted_convolution, hoisted_networks, prepared
from ncsr_fast.engine.memory import at_once
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.engine.program import Head, Program, stages
from ncsr_fast.engine.walk import LevelTensors, packed_weights
from ncsr_fast.layout import laid_out, readable
from ncsr_fast.ops.backend import companion_backend, covering_backend, kernels
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution
from ncsr_fast.ops.recorded import RecordedKernels
from ncsr_fast.ops.step_network import packs_weights

Window = tuple[slice, slice]  # rows and columns


class Level(Protocol):
    """Interface of a level for the engine: the attributes of `ncsr_fast.flow.level.FlowLevel` that it reads."""

    transition_steps: int
    steps: int
    pass_through: int
    branches: tuple[Branch, ...]
    split_channels: int
    eps: float
    cache: Cache

    @property
    def actnorm_bias(self) -> Tensor: ...

    @property
    def actnorm_logs(self) -> Tensor: ...

    @property
    def invconv(self) -> Tensor: ...

    @property
    def split_weight(self) -> Tensor: ...

    @property
    def split_bias(self) -> Tensor: ...

    @property
    def split_logs(self) -> Tensor: ...

    def squeezed(self, z: Tensor) -> Tensor: ...

    def unsqueezed(self, z: Tensor) -> Tensor: ...

    def networks(self, branch: Branch) -> NetworkParameters: ...

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]: ...


class FoldedLevel(NamedTuple):
    """The networks of a level, folded.

    Args:
        networks: The networks of every branch.
        hoisted: By condition, the rest of the first layers of all branches that have it, one branch after the other.
        weight: That of the hoisted convolution of the features, prepared for them; None where no branch reads them.
        packed: The networks of every branch as their backend reads them.
    """

    networks: tuple[Networks, ...]
    hoisted: dict[str | None, Hoisted]
    weight: HoistedWeight | None
    packed: tuple[tuple[Tensor, ...], ...]


class PreActivations:
    """Pre-activations of a level's networks, their places, and outputs that do not depend on the state.

    Args:
        sources: Tensors of pre-activations.
        places: By branch, of each of its networks, which of the sources has its pre-activation and the first of the channels.
        outputs: By branch, the outputs of all its networks, or None.
    """

    def __init__(self, branches: int) -> None:
        self.sources: list[Tensor] = []
        self.places: list[list[tuple[int, int]]] = [[] for _ in range(branches)]
        self.outputs: list[tuple[Tensor, ...] | None] = [None] * branches

    def add(self, source: Tensor, places: list[tuple[int, int]]) -> None:
        """Add a tensor of pre-activations; `places` are the branch and first channel of each, in order."""
        for branch, channel in places:
            self.places[branch].append((len(self.sources), channel))
        self.sources.append(source)


class LevelPlan:
    """A level in one direction, for one condition.

    Args:
        level: The level.
        features: Its condition, of a batch or of one image whose samples share it.
        options: Options of the engine.
        inverse: True for decoding.
    """

    def __init__(self, level: Level, features: Features, options: EngineOptions, inverse: bool) -> None:
        self.level, self.features, self.options, self.inverse = level, features, options, inverse
        self.recorded = _recorded(level, features)
        self._group: dict[str | None, list[int]] = {"features": [], "noise": [], None: []}  # branches by condition
        for index, branch in enumerate(level.branches):
            self._group[branch.condition].append(index)
        self._network_backend = covering_backend("step_network", options.backend, features.own)
        with without_autocast(features.own.device.type):
            self.mixing, self.folded = self._folded_mixing(), self._folded_networks()
            self._split = folded_split(level) if level.split_channels else None
            self._known = PreActivations(len(level.branches))
            self._add_known()
            self.program = self._make_program()

    def encode(
        self, z: Tensor, noise: Tensor | None = None, window: Window | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z → state of the next level, the split's latent (None without one), logdet (B,).

        Args:
            z: (B, C/s², s·h, s·w) for a level that squeezes by s.
            noise: As the model has it, or None for zero.
            window: Rows and columns of the level that results are wanted of, all but the halo of a tile; None: all. Where
                gradients are recorded there is none.
        """
        level, options = self.level, self.options
        with without_autocast(z.device.type):
            z, logdet = self._steps(laid_out(level.squeezed(z), options.memory_format), noise, None, window)
            if self._split is None:
                return within(z, window), None, logdet
            h = within(split_prior(self._split, z[:, : -level.split_channels]), window)
            z, density = ops.gaussian_split(within(z, window), h, backend=options.backend)
            return z[:, : -level.split_channels], z[:, -level.split_channels :], logdet + density

    def decode(
        self, z: Tensor, latent: Tensor | None, noise: Tensor | None = None, peaks: Peaks | None = None
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`: z and logdet (B,).

        Args:
            z: State of the next level, or the top latent; more samples than the features have share a batch of 1.
            latent: Latent of the split, None without a split.
            noise: As the model has it, or None for zero.
            peaks: Are added those of the state after each step decoded; not where gradients are recorded.
        """
        logdets, options = [], self.options
        with without_autocast(z.device.type):
            if self._split is not None and latent is not None:
                z, density = self._joined(z, latent, self._split)
                logdets.append(density)
            z = laid_out(z, options.memory_format)
            z, logdet = self._steps(z, noise, peaks)
            return self.level.unsqueezed(z), torch.stack([logdet, *logdets]).sum(dim=0)

    def _joined(self, z: Tensor, latent: Tensor, split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The state ahead of a split, of the state behind it and its latent; and the log-det (B,)."""
        joined, h = torch.cat([z, latent], dim=1), split_prior(split, z)
        return ops.gaussian_split(joined, h, inverse=True, backend=self.options.backend)

    def _steps(
        self, x: Tensor, noise: Tensor | None, peaks: Peaks | None, window: Window | None = None
    ) -> tuple[Tensor, Tensor]:
        sources = [*self._known.sources, *self._noise_source(noise)]
        # autograd sums the gradients of tensors that samples share
        sources = [source.expand(x.shape[0], -1, -1, -1) if source.requires_grad else source for source in sources]
        networks, outputs = self.folded.networks, tuple(self._known.outputs)
        tensors = LevelTensors(self.mixing.mix, self.mixing.offset, networks, tuple(sources), outputs, self.folded.packed)
        y, logdet = level_pass(x, tensors, self.program, self.options.checkpoint, peaks, window)
        counted = within(x, window)
        return y, logdet + self.mixing.logdet * (counted.shape[2] * counted.shape[3])

    def _folded_mixing(self) -> Mixing:
        level = self.level
        weights = level.actnorm_bias, level.actnorm_logs, level.invconv
        fold = partial(fold_mixing, *weights, level.transition_steps, self.inverse, self.options.backend)
        return fold() if self.recorded else level.cache.get(("mixing", self.inverse), weights, fold)

    def _folded_networks(self) -> FoldedLevel:
        level = self.level
        dtype = self.options.network_dtype(level.actnorm_bias.dtype)
        firsts = [level.networks(level.branches[index]).conv1 for index in self._group["features"]]
        rows = sum([conv1.shape[0] * conv1.shape[1] for conv1 in firsts])
        chosen = algorithm(self.features, rows, dtype, self.options.method)
        fold = partial(self._fold, dtype, chosen)
        name = "networks", dtype, chosen, self._network_backend if packs_weights(self._network_backend) else None
        return fold() if self.recorded else level.cache.get(name, level.parameters(), fold)

    def _fold(self, dtype: torch.dtype, algorithm: str) -> FoldedLevel:
        level = self.level
        hoisted: dict[str | None, list[Hoisted]] = {}
        branches = level.branches
        stacks = [(level.networks(branch), 0 if branch.changes_all else level.pass_through) for branch in branches]
        backend = companion_backend("fold_filters", self.options.backend, level.actnorm_bias)
        found, rests = zip(*fold_level(stacks, dtype, backend))
        for branch, rest in zip(branches, rests):
            hoisted.setdefault(branch.condition, []).append(rest)
        stacked = {condition: _stacked(parts) for condition, parts in hoisted.items()}
        weight, own_channels = None, self.features.own.shape[1]
        if "features" in stacked:
            weight = prepared(stacked["features"].weight, own_channels, algorithm, not self.recorded)
            stacked["features"] = Hoisted(weight.weight, stacked["features"].bias)  # without what was prepared otherwise
        packed = [packed_weights(networks, self._network_backend) for networks in found]
        return FoldedLevel(found, stacked, weight, tuple(packed))

    def _add_known(self) -> None:
        """Compute the pre-activations of the features and of branches without a condition."""
        if self._group["features"]:
            self._add_features()
        if self._group[None]:
            bias, size = self.folded.hoisted[None].bias, self.features.own.shape[2:]
            self._known.add(bias[None, :, None, None].expand(1, -1, *size), self._places(None))

    def _places(self, condition: str | None) -> list[tuple[int, int]]:
        """Branch and first channel of the pre-activations of a condition, as the hoisted convolution puts them out."""
        found, channel = [], 0
        for index in self._group[condition]:
            networks = self.folded.networks[index]
            for _ in range(len(networks.w2)):
                found.append((index, channel))
                channel = channel + networks.b2.shape[-1]  # a tensor where torch.jit.trace runs, which += would change
        return found

    def _add_features(self) -> None:
        places, bias, weight = self._places("features"), self.folded.hoisted["features"].bias, self.folded.weight
        assert weight is not None
        if self.recorded:
            self._known.add(hoisted_convolution(self.features, weight, bias, self.options.method), places)
            return
        for index in self._group["features"]:
            self._add_branch(index, [channel for branch, channel in places if branch == index], weight, bias)

    def _add_branch(self, index: int, channels: list[int], weight: HoistedWeight, bias: Tensor) -> None:
        """Add a branch, some networks at a time: their outputs if they read the features alone, else their pre-activations."""
        networks, packed, own = self.folded.networks[index], self.folded.packed[index], self.features.own
        count, hidden, changes_all = len(networks.w2), networks.b2.shape[-1], self.level.branches[index].changes_all
        size = own[:, :1].numel() * hidden * own.element_size()
        # in torch.export sizes are unknown
        together = count if isinstance(size, torch.SymInt) else max(1, at_once(own.device) // size)
        outputs: list[Tensor] = []
        for first in range(0, count, together):
            part = slice(first, min(count, first + together))
            start, end = channels[first], channels[part.stop - 1] + hidden
            arguments = self.features, weight.rows(start, end), bias[start:end]
            if changes_all:
                outputs += self._tails(index, part, hoisted_convolution(*arguments, self.options.method))
                continue
            for pre in hoisted_networks(*arguments, part.stop - first, self.options.method):
                # dense, but for kernels that read tiles of pixels: read for every sample, and a slice's pixels lie pages apart
                self._known.add(pre if packed else laid_out(pre, self.options.memory_format), [(index, 0)])
        if changes_all:
            self._known.outputs[index] = tuple(outputs)

    def _tails(self, index: int, part: slice, pre: Tensor) -> tuple[Tensor, ...]:
        """The outputs of some networks of a branch that reads the features alone."""
        networks, packed, method = self.folded.networks[index], self.folded.packed[index], self.options.method
        if is_deep(networks.w2):
            residual, own = self.level.networks(self.level.branches[index]).residual, networks.unbind()[part]
            each = pre.chunk(len(own), dim=1)
            return tuple(deep_network(None, one, network, residual, method) for one, network in zip(each, own))
        _, w2, b2, w3, b3 = networks
        called = kernels if readable((pre, w2, b2, w3, b3), by_pytorch=True) else RecordedKernels
        tails = called(self._network_backend).step_network_tails
        return tails(pre, w2[part], b2[part], w3[part], b3[part], tf32=method.tf32, packed=[stack[part] for stack in packed])

    def _noise_source(self, noise: Tensor | None) -> list[Tensor]:
        """The pre-activations of the branches whose condition is the noise, if there are any."""
        if not self._group["noise"]:
            return []
        own, (weight, bias) = self.features.own, self.folded.hoisted["noise"]
        if noise is None:
            return [bias[None, :, None, None].expand(own.shape[0], -1, *own.shape[2:])]
        v = laid_out(resized_noise(noise, own.shape[2:]).to(own.dtype), self.options.memory_format)
        return [convolution(v, weight, bias, self.options.method)]

    def _make_program(self) -> Program:
        level, places, options = self.level, self._known.places, self.options
        for index, channel in self._places("noise"):  # computed by each call, after the sources that are already computed
            places[index].append((len(self._known.sources), channel))
        heads = []
        for index, (branch, networks) in enumerate(zip(level.branches, self.folded.networks)):
            pass_through, hidden = 0 if branch.changes_all else level.pass_through, networks.b2.shape[-1]
            residual = level.networks(branch).residual
            known = places[index] or [(0, 0)] * len(networks.w2)  # where outputs are known, none is read
            numbered = enumerate(known)
            heads.append(tuple([Head(index, number, pass_through, *place, hidden, residual) for number, place in numbered]))
        backend = ops.resolve_backend("flow_step", options.backend, level.actnorm_bias)
        return Program(
            stages(heads, level.steps, self.inverse),
            tuple(heads),
            level.eps,
            self.inverse,
            backend,
            self._network_backend,
            options.method,
        )


def within(x: Tensor, window: Window | None) -> Tensor:
    """The rows and columns of a window; None: all."""
    return x if window is None else x[(..., *window)]


def folded_split(level: Level) -> tuple[Tensor, Tensor]:
    """Weight and bias of a split's convolution, the scale folded in."""
    return fold_zeros_convolution(level.split_weight, level.split_bias, level.split_logs)


def split_prior(split: tuple[Tensor, Tensor], z1: Tensor) -> Tensor:
    """Mean and log standard deviation, interleaved, of the channels that a split takes out: a convolution of z1 (Glow)."""
    return convolution(z1, *split, ConvolutionMethod())


def _recorded(level: Level, features: Features) -> bool:
    """True if autograd records the level's parameters or the features."""
    if not torch.is_grad_enabled():
        return False
    tensors = (*level.parameters(), *(tensor for tensor in features if tensor is not None))
    return any(tensor.requires_grad for tensor in tensors)


def _stacked(parts: list[Hoisted]) -> Hoisted:
    """The hoisted layers of several branches with one condition as one."""
    if len(parts) == 1:
        return parts[0]
    return Hoisted(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
