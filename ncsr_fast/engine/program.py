"""The order in which the affine maps of a level are applied, in one direction: a list of stages that walk and gradient share.

A conditional step is actnorm and 1×1 convolution, folded into `mix`, then its branches: affine maps of the state whose shift
and scale a network computes, in encoding order. The maps between two networks act on single pixels, and those next to the mix
are fused with it:

    encoding   stage k: mix of step k, after it the first branch if it changes all channels, before it the last branch of
               step k-1 if it changes half; then the other branches of step k, of which the last is left to stage k+1
    decoding   the branches of the last step; then for each step from the last: mix⁻¹, before it the inverse of the first
               branch if it changes all channels; then the inverses of the other branches of the step before, last first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ncsr_fast.ops.conv3x3 import ConvolutionMethod


class Head(NamedTuple):
    """The affine map of a branch at one step, and the network that computes its shift and scale.

    Args:
        branch: Number of the branch.
        network: Number of the network among the branch's.
        pass_through: The first channels of the state, which the map leaves unchanged and the network reads (coupling); 0: it
            changes all channels, and its network reads the condition alone (injector).
        source: Number of the tensor that contains the network's pre-activation.
        channel: First channel of the pre-activation in that tensor.
        hidden: Number of channels of the pre-activation.
        residual: Of a deep network with residuals, the layers inside each; 0: none.
    """

    branch: int
    network: int
    pass_through: int
    source: int
    channel: int
    hidden: int
    residual: int = 0


class Stage(NamedTuple):
    """Actnorm and 1×1 convolution of a step with the affines fused to it, then branches, whose networks read the state.

    Args:
        mix: Number of the step, or None: branches alone.
        before: Affine fused before the mix, or None.
        after: Affine fused after the mix, or None.
        heads: Branches, in the order in which they are applied.
        deferred: The branch after `heads`, which the next stage applies as its `before`; or None.
    """

    mix: int | None
    before: Head | None
    after: Head | None
    heads: tuple[Head, ...]
    deferred: Head | None

    @property
    def evaluated(self) -> tuple[Head, ...]:
        """The heads whose networks this stage evaluates."""
        return self.heads if self.deferred is None else (*self.heads, self.deferred)


class Link(NamedTuple):
    """The maps from one network that reads the state to the next: a branch's affine, and the mix behind it.

    Args:
        head: The branch, None ahead of the first network.
        mix: Number of the step of the mix behind it, or None.
        injector: Affine fused to the mix: behind it when encoding, ahead of it when decoding; or None.
    """

    head: Head | None
    mix: int | None = None
    injector: Head | None = None


class Program(NamedTuple):
    """The evaluation of a level, without its tensors.

    Args:
        stages: The stages, in the order in which they are applied.
        heads: The heads of every branch.
        eps: Lower bound of the scales.
        inverse: The affines are inverse maps: decoding.
        backend: Resolved backend of the maps.
        network_backend: Resolved backend of the networks.
        method: How the gradients of networks are convolved.
    """

    stages: tuple[Stage, ...]
    heads: tuple[tuple[Head, ...], ...]
    eps: float
    inverse: bool
    backend: str
    network_backend: str
    method: ConvolutionMethod

    @property
    def links(self) -> tuple[Link, ...]:
        """The stages as one chain: a mix is joined to the coupling ahead of it, where there is one."""
        found: list[Link] = []
        for stage in self.stages:
            if stage.mix is not None:
                injector = stage.before if self.inverse else stage.after
                last = found[-1].head if found else None
                joined = last is not None and last.pass_through and (self.inverse or last is stage.before)
                found[len(found) - joined :] = [Link(last if joined else None, stage.mix, injector)]
            found += map(Link, stage.evaluated)
        return tuple(found)


def stages(branches: Sequence[Sequence[Head]], steps: int, inverse: bool) -> tuple[Stage, ...]:
    """The stages of a level with `steps` conditional steps; `branches` has the heads of each branch, in encoding order."""
    heads: list[list[Head]] = [[] for _ in range(steps)]
    for branch in branches:
        for step, head in enumerate(branch, steps - len(branch)):  # the last steps have it
            heads[step].append(head)
    return _decoding(heads) if inverse else _encoding(heads)


def _encoding(heads: list[list[Head]]) -> tuple[Stage, ...]:
    found: list[Stage] = []
    before = None
    for k, own in enumerate(heads):
        after, others = _split_first(own)
        deferred = others.pop() if k < len(heads) - 1 and others and others[-1].pass_through else None
        found.append(Stage(k, before, after, tuple(others), deferred))
        before = deferred
    return tuple(found)


def _decoding(heads: list[list[Head]]) -> tuple[Stage, ...]:
    fused, others = zip(*map(_split_first, heads))
    found = [Stage(None, None, None, tuple(reversed(others[-1])), None)]
    for k in reversed(range(len(heads))):
        found.append(Stage(k, fused[k], None, tuple(reversed(others[k - 1])) if k else (), None))
    return tuple(found)


def _split_first(heads: list[Head]) -> tuple[Head | None, list[Head]]:
    """The first head of a step if it changes all channels, and the others."""
    return (heads[0], heads[1:]) if heads and not heads[0].pass_through else (None, heads[:])
