"""A level's folded parameters, and what its steps need of the condition: pre-activations and the injectors' outputs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ncsr_fast.engine.convolution import convolution
from ncsr_fast.engine.folding import Hoisted, Mixing, Networks, Parameters, fold_mixing, fold_networks
from ncsr_fast.engine.hoisting import combinations, copies_suffice, enlarged_convolution, hoisted_convolution
from ncsr_fast.engine.level import Conditions, Level, Settings, inject, parts
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.layout import laid_out

# Bytes of pre-activations computed together where nothing is kept for a backward pass.
_AT_ONCE = 256 * 2**20


class LevelParameters(Protocol):
    """What `ncsr_fast.nn.level.FlowLevel` holds."""

    actnorm_bias: Tensor
    actnorm_logs: Tensor
    invconv: Tensor
    injectors: Parameters
    couplings: Parameters
    noise_couplings: Parameters | None
    transition_steps: int
    kept: int


class FoldedNetworks(NamedTuple):
    """All networks of a level and the hoisted parts of their first layers."""

    injectors: Networks
    couplings: Networks
    noise_couplings: Networks | None
    hoisted: Hoisted  # of the injectors, then of the couplings
    hoisted_noise: Hoisted | None


class Features(NamedTuple):
    """The condition u of a level."""

    own: Tensor  # (B, c, h, w) of the encoder at the level's resolution
    stacked: Tensor | None  # (B, s, h', w') block outputs at LR resolution

    @property
    def enlarged(self) -> bool:
        """Whether the level is larger than LR."""
        return self.stacked is not None and self.own.shape[2] > self.stacked.shape[2]


def fold_level(parameters: LevelParameters, dtype: torch.dtype) -> FoldedNetworks:
    """The networks of a level, in `dtype`."""
    injectors, of_injectors = fold_networks(parameters.injectors, 0, dtype)
    couplings, of_couplings = fold_networks(parameters.couplings, parameters.kept, dtype)
    noise, of_noise = None, None
    if parameters.noise_couplings is not None:
        noise, of_noise = fold_networks(parameters.noise_couplings, parameters.kept, dtype)
    hoisted = Hoisted(*(torch.cat(pair) for pair in zip(of_injectors[:2], of_couplings[:2])))
    return FoldedNetworks(injectors, couplings, noise, hoisted, of_noise)


def prepare(networks: FoldedNetworks, features: Features, options: EngineOptions) -> FoldedNetworks:
    """The same for a level larger than LR, without gradients."""
    weight, bias, _ = networks.hoisted
    split = features.own.shape[1]
    if copies_suffice(*features, weight[:, split:], options.method):
        return networks
    hoisted = Hoisted(weight[:, :split].contiguous(), bias, combinations(weight[:, split:]))
    return networks._replace(hoisted=hoisted)


def mix_level(parameters: LevelParameters, inverse: bool) -> Mixing:
    """The actnorms and 1×1 convolutions of a level, or their inverses."""
    bias, logs, weight = parameters.actnorm_bias, parameters.actnorm_logs, parameters.invconv
    return fold_mixing(bias, logs, weight, parameters.transition_steps, inverse)


def level_of(networks: FoldedNetworks, mixing: Mixing) -> Level:
    return Level(mixing.mix, mixing.offset, networks.injectors, networks.couplings, networks.noise_couplings)


def hoist(networks: FoldedNetworks, features: Features, options: EngineOptions) -> Tensor:
    """The pre-activations (B, 2K·hidden, h, w) of all injectors and couplings. Differentiable."""
    weight, bias, _ = networks.hoisted
    return hoisted_convolution(*features, weight, bias, options.method, options.subpixel)


def hoist_noise(networks: FoldedNetworks, noise: Tensor | None, like: Tensor, options: EngineOptions) -> Tensor | None:
    """The pre-activations (B, K'·hidden, h, w) of the noise couplings, None without any; a None noise is zero everywhere."""
    if networks.hoisted_noise is None:
        return None
    weight, bias, _ = networks.hoisted_noise
    if noise is None:
        return bias[None, :, None, None].expand(like.shape[0], -1, *like.shape[2:])
    return convolution(laid_out(noise.to(like.dtype), options.memory_format), weight, bias, options.method)


def conditions(
    networks: FoldedNetworks, features: Features, noise: Tensor | None, settings: Settings, options: EngineOptions
) -> Conditions:
    """What the steps need, without gradients: some steps at a time, so that the injectors' hidden layers are not all there."""
    count, half = len(networks.injectors.w2), len(networks.hoisted.bias) // 2
    hidden = half // count
    size = features.own[:, :1].numel() * hidden * features.own.element_size()
    together = count if isinstance(size, torch.SymInt) else max(1, _AT_ONCE // size)  # torch.export knows no sizes
    raws: list[Tensor] = []
    pres: list[Tensor] = []
    for first in range(0, count, together):
        last = min(first + together, count)
        part = Networks(*(None if tensor is None else tensor[first:last] for tensor in networks.injectors))
        pre = _of_outputs(networks.hoisted, features, first * hidden, last * hidden, options)
        raws += inject(part, pre, settings)
    for first in range(0, count, together):
        last = min(first + together, count)
        pre = _of_outputs(networks.hoisted, features, half + first * hidden, half + last * hidden, options)
        # dense: read for every sample, and the pixels of a slice lie pages apart
        pres += [laid_out(of_step, options.memory_format) for of_step in parts(pre, networks.couplings)]
    noise_pre = hoist_noise(networks, noise, features.own, options)
    return Conditions(raws, pres, parts(noise_pre, networks.noise_couplings))


def _of_outputs(hoisted: Hoisted, features: Features, first: int, last: int, options: EngineOptions) -> Tensor:
    """Some of the pre-activations."""
    weight, bias = hoisted.weight[first:last], hoisted.bias[first:last]
    if hoisted.combinations is None:
        return hoisted_convolution(*features, weight, bias, options.method, options.subpixel)
    products = [[part[first:last] for part in row] for row in hoisted.combinations]
    return enlarged_convolution(*features, weight, bias, options.method, products)
