"""Memory of decoding one level, in terms that each name tensors of the engine (`ncsr_fast.engine.plan`, `.walk`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ncsr_fast.engine.condition import Features
from ncsr_fast.engine.folding import is_deep
from ncsr_fast.engine.hoisting import algorithm
from ncsr_fast.engine.memory import at_once
from ncsr_fast.layout import laid_out
from ncsr_fast.ops.backend import covering_backend
from ncsr_fast.ops.step_network import packs_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ncsr_fast.config import Branch, FlowConfig
    from ncsr_fast.engine.options import EngineOptions
    from ncsr_fast.flow.level import FlowLevel

_DOUBLE = 8  # bytes: mixes are composed in float64
_MIXES = 4  # while they are: the weights, their inverses, the maps, and an intermediate result
# Of a step: the state given, that ahead of the step, behind its coupling and behind its mix, the network's output, magnitudes.
_STATES = 6
_MAPS = 3  # the scale, the quotient and the difference of an affine map, of the reference, which has no kernel
_HIDDEN = 3  # layers of a network without a kernel: one that is read, its convolution, and the sum or activation of that
_PRODUCTS = 5  # of a hoisted convolution: three, a line of cells, and the line before


def plan_bytes(level: FlowLevel, flow: FlowConfig, element: int) -> int:
    """Bytes a pixel of a level that the plan of decoding it stores, without a noise, in numbers of `element` bytes."""
    count = 0
    for branch in level.branches:
        if branch.condition == "features":
            count += (branch.steps or 0) * (2 * level.channels if branch.changes_all else flow.hidden_channels)
    return count * element


def walk_bytes(level: FlowLevel, flow: FlowConfig, element: int) -> int:
    """Bytes a pixel of a level, of one sample, by which tiles and samples at a time are chosen: hidden layers and states."""
    return (2 * flow.hidden_channels + 8 * level.channels) * element


class Weights(NamedTuple):
    """Bytes of a level's weights as they are folded, beside the parameters.

    Args:
        stored: By the cache, for as long as samples are decoded.
        mixing: While 1×1 convolutions are inverted and composed, before the others are folded.
        folding: Beside `stored`, while networks are folded: the first layers with their scales, before they are joined.
    """

    stored: int
    mixing: int
    folding: int


class LevelMemory:
    """Memory of decoding a level, or a tile of it.

    Args:
        level: The level.
        flow: The flow.
        options: Options of the engine.
        own_channels: Of the level's features that have its resolution; the others are stacked, of LR resolution.
        scale: Sides of the level over those of the LR image.
    """

    def __init__(self, level: FlowLevel, flow: FlowConfig, options: EngineOptions, own_channels: int, scale: float) -> None:
        self.level, self.flow, self.scale = level, flow, scale
        self._like: Tensor = level.actnorm_bias
        dtype = options.network_dtype(self._like.dtype)
        self.element, self.own = dtype.itemsize, own_channels
        self.stacked = max(0, level.config.condition_channels - own_channels)
        probe = self._like.new_empty(0, dtype=dtype)
        self._backend = covering_backend("step_network", options.backend, probe)
        self._plain = options.engine == "plain" or not level.has_kernels
        if self._plain:
            self.element = self._like.element_size()  # whatever the precision
            return
        branches = [branch for branch in level.branches if branch.condition == "features"]
        rows = sum(level.networks(branch).conv1[:, :, 0, 0, 0].numel() for branch in branches)
        self._algorithm = algorithm(self._small_features(probe, options), rows, dtype, options.method)

    def _small_features(self, probe: Tensor, options: EngineOptions) -> Features:
        """Features of a small image, for which the engine chooses as for large ones."""
        side = 2 * max(1, round(1 / self.scale))
        sides = round(side * self.scale), side
        own, stacked = (
            laid_out(probe.new_empty(1, channels, each, each), options.memory_format)
            for channels, each in zip((self.own, self.stacked), sides)
        )
        return Features(own, stacked if self.stacked else None)

    def weights(self) -> Weights:
        """Bytes of the level's weights; the reference folds those of a step at a time."""
        if self._plain:
            return Weights(0, 0, 0)
        level, stored, first = self.level, 0, 0.0
        conditions = [branch.condition for branch in level.branches]
        for branch in level.branches:
            networks = level.networks(branch)
            conv1, read = networks.conv1.numel(), 0 if branch.changes_all else level.pass_through
            state = conv1 * read // networks.conv1.shape[2]
            deep = is_deep(networks.conv2)  # whose other layers are the parameters themselves
            products = branch.condition == "features" and self._algorithm == "products"
            viewed = conditions.count(branch.condition) == 1 and not products  # its first layers, joined to no others
            stored += state + networks.conv3.numel() + (0 if deep else networks.conv2.numel())
            stored += (0 if deep else conv1) if viewed else conv1 - state
            if packs_weights(self._backend) and not deep:
                stored += state + networks.conv2.numel() + networks.conv3.numel()
            first += 0 if viewed or deep else conv1
            if products:  # the joined weight until they are made of it, and its sums over rows, a third of what is stacked
                first += (conv1 - state) * (1 + self.stacked / (3 * (self.own + self.stacked)))
        mixes = level.invconv.numel()
        stored_mixes = level.steps * level.channels**2 * self._like.element_size()
        return Weights(self.element * stored + stored_mixes, _MIXES * mixes * _DOUBLE, round(self.element * first))

    def plan(self, pixels: int) -> int:
        """Bytes that a plan of so many pixels stores: outputs of injectors, pre-activations of couplings.

        Of the reference, which has no plan, the features that it reads.
        """
        if self._plain:
            return self._joined(pixels)
        return plan_bytes(self.level, self.flow, self.element) * pixels

    def planning(self, pixels: int) -> int:
        """The most bytes while such a plan is made, what it stores until then included.

        Of a branch so many pre-activations are computed at a time as `at_once` allows, by a convolution that has its own
        intermediate results; then injectors' outputs are made of them, or couplings' are copied one by one.
        """
        if self._plain:
            return self.plan(pixels)
        flow, level, stored, most = self.flow, self.level, 0, 0
        for branch in level.branches:
            if branch.condition != "features":
                continue
            count, one = branch.steps or 0, flow.hidden_channels * pixels * self.element
            together = min(count, max(1, at_once(self._like.device) // one))
            each = 2 * level.channels * pixels * self.element if branch.changes_all else one
            done = together * each + (self._hidden(branch) * pixels if branch.changes_all else 0)
            convolved = together * one
            before = stored + (count - together) * each
            most = max(most, before + convolved + max(self._hoisting(convolved, pixels), done))
            stored += count * each
        return most

    def growing(self, pixels: int) -> int:
        """The most bytes while features of so many pixels are made: upsampled, convolved and activated."""
        return 3 * self.grown(pixels)

    def grown(self, pixels: int) -> int:
        """Bytes of own features of so many pixels."""
        return self.own * pixels * self.element

    def walk(self, pixels: int) -> int:
        """Bytes of evaluating the steps, of one sample of so many pixels."""
        level, state = self.level, self.level.channels * self._like.element_size()
        maps = _MAPS * (self._backend == "reference")
        if self._plain:  # every network reads its own copy of the features
            hidden = _HIDDEN * self.flow.hidden_channels * self.element
            return max(self._joined(pixels) + (2 * state + hidden) * pixels, (_STATES + maps) * state * pixels)
        hidden = max((self._hidden(branch) for branch in level.branches if not branch.changes_all), default=0)
        return max(2 * state + hidden, (_STATES + maps) * state) * pixels

    def _joined(self, pixels: int) -> int:
        """Bytes of joining own and stacked features to one tensor."""
        return (self.own + self.stacked) * pixels * self.element if self.stacked else 0

    def _hidden(self, branch: Branch) -> int:
        """Bytes a pixel of the hidden layers of a network, which a kernel of all its layers does not store.

        A deep network, convolved layer by layer, has its first layer too, and by a kernel activates where it convolves.
        """
        deep, own_kernel = is_deep(self.level.networks(branch).conv2), self._backend == "native"
        layers = _HIDDEN + deep - own_kernel if deep or not own_kernel else 0
        return layers * self.flow.hidden_channels * self.element

    def _hoisting(self, convolved: int, pixels: int) -> int:
        """Bytes of intermediate results of a hoisted convolution whose output has so many bytes."""
        stacked, cells = self.stacked * pixels * self.element, round(max(1, self.scale)) ** 2
        if self._algorithm == "products":
            return max(_PRODUCTS * convolved, 3 * convolved + 2 * stacked) // cells
        if self._algorithm == "joined":
            return self._joined(pixels)
        return 0 if self.scale >= 1 else stacked  # resized to less than LR size
