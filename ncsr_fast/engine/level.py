"""The conditional steps of a level, in both directions, on what was computed before them.

Encoding, w_k being the state after the injector of step k, and decoding, y_k the state after the coupling of step k:

    w_0 = inject_0(mix_0 x),   w_{k+1} = inject_{k+1}(mix_{k+1} couple_k(w_k)),   y = couple_{K-1}(w_{K-1})
    y_{k-1} = mix_k⁻¹ inject_k⁻¹(couple_k⁻¹(y_k))

with couple(w) = affine(w; h) or, with a noise coupling, affine(affine(w; h_noise); h). Every network of a step reads z1, the
first half of the state's channels, which the couplings leave alone; of the condition it gets its hoisted pre-activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine import network
from ncsr_fast.engine.convolution import ConvolutionMethod
from ncsr_fast.engine.folding import Networks
from ncsr_fast.engine.network import Network
from ncsr_fast.engine.step import mixed_step
from ncsr_fast.ops.affine_injector import affine


class Settings(NamedTuple):
    """What is not a tensor."""

    eps: float
    inverse: bool
    backend: str  # resolved
    method: ConvolutionMethod


class Conditions(NamedTuple):
    """What does not depend on the state, of one batch or of one image whose samples share it."""

    raws: list[Tensor]  # of each step: what its injector shifts and scales by, (B, 2C, h, w)
    pre: Sequence[Tensor]  # of each step's coupling, (B, hidden, h, w)
    pre_noise: Sequence[Tensor]  # of the noise couplings of the last steps, likewise


class Level(NamedTuple):
    """Folded parameters of the conditional steps."""

    mix: Tensor  # (K, C, C), of the inverse maps when decoding
    offset: Tensor  # (K, C)
    injectors: Networks
    couplings: Networks
    noise_couplings: Networks | None


Layers = tuple[Tensor, Tensor, Tensor]  # of a network: see `network.layers`


def inject(injectors: Networks, pre: Tensor, settings: Settings, layers: list[Layers] | None = None) -> list[Tensor]:
    """The outputs of all injector networks, from their pre-activations (B, K·hidden, h, w).

    layers  is appended those of each network, which are computed then without recording gradients
    """
    return [_evaluate(net, None, part, settings, layers) for net, part in zip(unbind(injectors), parts(pre, injectors))]


def steps(
    x: Tensor,
    conditions: Conditions,
    level: Level,
    settings: Settings,
    states: list[Tensor] | None = None,
    peaks: list[Tensor] | None = None,
    layers: list[list[Layers]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The state after the steps (of the inverse: before them), and the log|det| (B,) of injectors and couplings.

    x           (B, C, h, w); a batch of 1 of the conditions is shared by all of it
    states      is appended the state that each step's networks read
    peaks       is appended the largest magnitude (B,) of the state after each step, NaN where it holds one
    layers      is appended for each step those of its networks, computed then without recording gradients
    """
    run = _decode if settings.inverse else _encode
    return run(x, conditions, level, settings, states, peaks, layers)


def _encode(
    x: Tensor,
    conditions: Conditions,
    level: Level,
    settings: Settings,
    states: list[Tensor] | None,
    peaks: list[Tensor] | None,
    layers: list[list[Layers]] | None,
) -> tuple[Tensor, Tensor]:
    h, logdets, last = None, [], len(level.mix) - 1
    for k, nets in enumerate(networks_of_steps(level, conditions)):
        raw = conditions.raws[k].expand(x.shape[0], -1, -1, -1)
        x, logdet = mixed_step(x, level.mix[k], level.offset[k], h, raw, settings.eps, False, settings.backend)
        _record(x, states, peaks)
        logdets.append(logdet)
        h, *noise = _heads(nets, x, settings, layers)
        for values in [*noise, h] if k == last else noise:  # the next step applies the coupling of this one
            x, logdet = _couple(x, values, settings)
            logdets.append(logdet)
    return x, torch.stack(logdets).sum(dim=0)


def _decode(
    x: Tensor,
    conditions: Conditions,
    level: Level,
    settings: Settings,
    states: list[Tensor] | None,
    peaks: list[Tensor] | None,
    layers: list[list[Layers]] | None,
) -> tuple[Tensor, Tensor]:
    logdets = []
    nets = networks_of_steps(level, conditions)
    for k in reversed(range(len(level.mix))):
        _record(x, states, None)
        for values in _heads(nets[k], x, settings, layers):
            x, logdet = _couple(x, values, settings)
            logdets.append(logdet)
        raw = conditions.raws[k].expand(x.shape[0], -1, -1, -1)
        x, logdet = mixed_step(x, level.mix[k], level.offset[k], raw, None, settings.eps, True, settings.backend)
        _record(x, None, peaks)
        logdets.append(logdet)
    return x, torch.stack(logdets).sum(dim=0)


def _heads(
    nets: list[tuple[Network, Tensor]], x: Tensor, settings: Settings, layers: list[list[Layers]] | None
) -> list[Tensor]:
    z1, of_step = x[:, : x.shape[1] // 2], None
    if layers is not None:
        layers.append(of_step := [])
    return [_evaluate(net, z1, pre, settings, of_step) for net, pre in nets]


def _couple(x: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    return affine(x, values, x.shape[1] // 2, settings.eps, settings.inverse, settings.backend)


def _evaluate(net: Network, z1: Tensor | None, pre: Tensor, settings: Settings, layers: list[Layers] | None) -> Tensor:
    if layers is None:
        return network.evaluate(net, z1, pre, settings.backend, settings.method)
    layers.append(network.layers(net, z1, pre, settings.backend, settings.method))
    return layers[-1][2]


def _record(x: Tensor, states: list[Tensor] | None, peaks: list[Tensor] | None) -> None:
    if states is not None:
        states.append(x)
    if peaks is not None:
        peaks.append(x.abs().amax(dim=(1, 2, 3)))


def networks_of_steps(level: Level, conditions: Conditions) -> list[list[tuple[Network, Tensor]]]:
    """For every step its coupling network with the pre-activation, then the noise coupling's where it has one."""
    nets = [[pair] for pair in zip(unbind(level.couplings), conditions.pre)]
    if level.noise_couplings is not None:
        noise = list(zip(unbind(level.noise_couplings), conditions.pre_noise))
        for own, pair in zip(nets[-len(noise) :], noise):
            own.append(pair)
    return nets


def unbind(networks: Networks) -> list[Network]:
    """The networks one by one."""
    count = len(networks.w2)
    return [Network(*tensors) for tensors in zip(*([None] * count if t is None else t.unbind() for t in networks))]


def parts(pre: Tensor | None, networks: Networks | None) -> tuple[Tensor, ...]:
    """The pre-activations (B, K·hidden, h, w) of stacked networks one by one, as views; none of no networks."""
    return () if networks is None else pre.split(networks.w2.shape[1], dim=1)
