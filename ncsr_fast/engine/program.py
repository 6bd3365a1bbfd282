"""The order in which the affine maps of a level are applied, in one direction: a list of stages that walk and gradient share.

A conditional step is actnorm and 1×1 convolution, folded into `mix`, then its branches: affine maps of the state whose shift
and scale a network computes, in encoding order. Between two networks lie only maps of single pixels, and those that touch the
mix are fused with it:

    encoding   stage k: mix of step k, behind it the first branch if it changes all channels, ahead of it the last branch of
               step k-1 if it changes half; then the other branches of step k, of which the last is left to stage k+1
    decoding   the branches of the last step; then for each step from the last: mix⁻¹, ahead of it the inverse of the first
               branch if it changes all channels; then the inverses of the other branches of the step before, last first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ncsr_fast.ops.contract import pass_through_channels
from ncsr_fast.ops.conv3x3 import ConvolutionMethod


class Place(NamedTuple):
    """Where the pre-activation of a network is: which tensor of pre-activations, and the first of its channels."""

    source: int
    channel: int


class BranchProgram(NamedTuple):
    """A branch of the last steps of a level.

    Args:
        steps: How many of the last steps have it, which is the number of its networks.
        changes_all: True: it changes all channels, and its networks read the condition alone (injector). False: it changes
            the second half of the channels, and its networks read the first half too (coupling).
        hidden: Channels of a pre-activation.
        places: Where the pre-activation of each network is.
    """

    steps: int
    changes_all: bool
    hidden: int
    places: tuple[Place, ...]


class Head(NamedTuple):
    """The affine map of a branch at one step: the branch's number, and that of the network among the branch's."""

    branch: int
    network: int


class Stage(NamedTuple):
    """Actnorm and 1×1 convolution of a step with the affines fused to it, then branches.

    Args:
        mix: Number of the step, or None: branches alone.
        before: Affine fused ahead of the mix, or None.
        after: Affine fused behind it, or None.
        heads: Branches whose networks read the state behind the mix, in the order in which they are applied.
        deferred: Whether the last of the heads is applied by the next stage, as its `before`.
    """

    mix: int | None
    before: Head | None
    after: Head | None
    heads: tuple[Head, ...]
    deferred: bool

    @property
    def applied(self) -> tuple[Head, ...]:
        """The heads that this stage applies."""
        return self.heads[:-1] if self.deferred else self.heads


class Program(NamedTuple):
    """All of a level's evaluation that is no tensor.

    Args:
        stages: What is applied, first to last.
        branches: By number.
        eps: Lower bound of the scales.
        inverse: The affines are inverse maps: decoding.
        backend: Of the maps, resolved.
        network_backend: Of the networks, resolved.
        method: How the gradients of networks are convolved.
    """

    stages: tuple[Stage, ...]
    branches: tuple[BranchProgram, ...]
    eps: float
    inverse: bool
    backend: str
    network_backend: str
    method: ConvolutionMethod

    def pass_through(self, head: Head, channels: int) -> int:
        """The number of first channels of the state that a head leaves unchanged."""
        return pass_through_channels(channels) if self.reads_state(head) else 0

    def reads_state(self, head: Head) -> bool:
        """Whether the network of a head reads the pass-through channels, besides its condition."""
        return not self.branches[head.branch].changes_all


def stages(branches: Sequence[BranchProgram], steps: int, inverse: bool) -> tuple[Stage, ...]:
    """The stages of a level of so many conditional steps, whose branches are given in encoding order."""
    heads = [
        [Head(b, k - steps + branch.steps) for b, branch in enumerate(branches) if k >= steps - branch.steps]
        for k in range(steps)
    ]
    return _decoding(branches, heads) if inverse else _encoding(branches, heads)


def _encoding(branches: Sequence[BranchProgram], heads: list[list[Head]]) -> tuple[Stage, ...]:
    found, before = [], None
    for k, own in enumerate(heads):
        after, others = _split_first(branches, own)
        deferred = k < len(heads) - 1 and bool(others) and not branches[others[-1].branch].changes_all
        found.append(Stage(k, before, after, tuple(others), deferred))
        before = others[-1] if deferred else None
    return tuple(found)


def _decoding(branches: Sequence[BranchProgram], heads: list[list[Head]]) -> tuple[Stage, ...]:
    fused = [_split_first(branches, own) for own in heads]
    others = [tuple(reversed(rest)) for _, rest in fused]
    found = [Stage(None, None, None, others[-1], False)]
    for k in reversed(range(len(heads))):
        found.append(Stage(k, fused[k][0], None, others[k - 1] if k else (), False))
    return tuple(found)


def _split_first(branches: Sequence[BranchProgram], heads: list[Head]) -> tuple[Head | None, list[Head]]:
    """The first head of a step if it changes all channels, and the others."""
    if heads and branches[heads[0].branch].changes_all:
        return heads[0], heads[1:]
    return None, heads
