"""The steps of a level as one differentiable piece, which can keep little and compute the small networks anew.

The forward pass keeps the state at every step, the hoisted pre-activations and the injectors' outputs, and without
checkpointing the hidden layers of the networks. The backward pass walks the steps in the opposite order, with checkpointing
computes the hidden layers of one step's networks at a time, and writes the gradients of the pre-activations into one tensor,
so that the large convolution before them has one backward pass. It does not invert the flow: a network whose forward pass is
healthy can have an inverse that amplifies rounding by 1e15.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.engine import network
from ncsr_fast.engine.folding import Networks
from ncsr_fast.engine.function import Piece, Tensors
from ncsr_fast.engine.level import Conditions, Layers, Level, Settings, inject, networks_of_steps, parts, steps, unbind
from ncsr_fast.engine.network import Network
from ncsr_fast.ops._backends import implementation


def level_pass(
    x: Tensor, hoisted: Tensor, pre_noise: Tensor | None, level: Level, settings: Settings, checkpoint: bool
) -> tuple[Tensor, Tensor]:
    """The state after the steps (of the inverse: before them), and the log|det| (B,) of injectors and couplings.

    x           (B, C, h, w)
    hoisted     (B, 2K·hidden, h, w) pre-activations: of all injectors, then of all couplings
    pre_noise   (B, K'·hidden, h, w) or None
    checkpoint  False: the hidden layers of the networks are kept, not computed anew in the backward pass
    """
    noise = level.noise_couplings or Networks(None, None, None, None, None)
    tensors = (x, hoisted, pre_noise, level.mix, level.offset, *level.injectors, *level.couplings, *noise)
    return _level_pass(tensors, settings, checkpoint)


def _level(tensors: Tensors) -> Level:
    injectors, couplings, noise = (Networks(*tensors[first : first + 5]) for first in (5, 10, 15))
    return Level(tensors[3], tensors[4], injectors, couplings, None if noise.w2 is None else noise)


def _reference(*arguments: Tensor | None | Settings | bool) -> Tensors:
    *tensors, settings, _ = arguments
    return _run(tuple(tensors), settings._replace(backend="reference"))[0]


def _run(
    tensors: Tensors,
    settings: Settings,
    states: list[Tensor] | None = None,
    of_injectors: list[Layers] | None = None,
    of_couplings: list[list[Layers]] | None = None,
) -> tuple[Tensors, list[Tensor]]:
    """The outputs of the steps, and those of the injectors; the lists are appended what `steps` and `inject` say."""
    x, hoisted, pre_noise = tensors[:3]
    level = _level(tensors)
    injectors, couplings = hoisted.chunk(2, dim=1)
    raws = inject(level.injectors, injectors, settings, of_injectors)
    given = Conditions(raws, parts(couplings, level.couplings), parts(pre_noise, level.noise_couplings))
    return steps(x, given, level, settings, states, layers=of_couplings), raws


def _forward(tensors: Tensors, settings: Settings, checkpoint: bool) -> tuple[Tensors, Tensors]:
    states: list[Tensor] = []
    of_injectors, of_couplings = (None, None) if checkpoint else ([], [])
    outputs, raws = _run(tensors, settings, states, of_injectors, of_couplings)
    encoding = -1 if settings.inverse else 1  # the steps from first to last, whatever was first here
    kept = [*states[::encoding], *raws, outputs[0] if settings.inverse else None]
    if not checkpoint:
        kept += [h2 for _, h2, _ in of_injectors]
        kept += [tensor for of_step in of_couplings[::encoding] for layers in of_step for tensor in layers]
    return outputs, tuple(kept)


def _backward(grads: Tensors, inputs: Tensors, kept: Tensors, needed: tuple[bool, ...], settings: Settings, _: bool) -> Tensors:
    walk = _Walk(inputs, kept, needed, settings)
    dx = walk.decoding(*grads) if settings.inverse else walk.encoding(*grads)
    found = (dx, walk.dhoisted, walk.dpre_noise, walk.dmix, walk.doffset)
    return *found, *(gradient for networks in walk.dnetworks for gradient in networks)


class _Walk:
    """The backward pass: the gradients, filled in as it goes from step to step."""

    def __init__(self, inputs: Tensors, kept: Tensors, needed: tuple[bool, ...], settings: Settings) -> None:
        self.x, hoisted, pre_noise = inputs[:3]
        self.level, self.settings, self.kernels = _level(inputs), settings, implementation(settings.backend)
        self.count = len(self.level.mix)
        self.read, self.raws = kept[: self.count], kept[self.count : 2 * self.count]
        self.y, *hidden = kept[2 * self.count :]
        self.weights = any(needed[5:])
        of_injectors, of_couplings = hoisted.chunk(2, dim=1)
        pres = parts(of_couplings, self.level.couplings), parts(pre_noise, self.level.noise_couplings)
        self.nets = networks_of_steps(self.level, Conditions([], *pres))
        self.injectors = list(zip(unbind(self.level.injectors), parts(of_injectors, self.level.injectors)))
        self.h2_of_injectors, others = hidden[: self.count], iter(hidden[self.count :])  # kept, or none
        self.layers = [[(next(others), next(others), next(others)) for _ in nets] for nets in self.nets] if hidden else []

        self.dhoisted = torch.empty_like(hoisted)
        self.dpre_noise = None if pre_noise is None else torch.empty_like(pre_noise)
        self.dmix, self.doffset = torch.empty_like(self.level.mix), torch.empty_like(self.level.offset)
        self.dnetworks = [_empty(inputs[first : first + 5], self.weights) for first in (5, 10, 15)]
        dinjectors, dcouplings = self.dhoisted.chunk(2, dim=1)
        self.dpre_injectors = parts(dinjectors, self.level.injectors)
        self.dpres = [[dpre] for dpre in parts(dcouplings, self.level.couplings)]
        if pre_noise is not None:
            noise = parts(self.dpre_noise, self.level.noise_couplings)
            for own, dpre in zip(self.dpres[-len(noise) :], noise):
                own.append(dpre)

    def encoding(self, dy: Tensor, dlogdet: Tensor) -> Tensor:
        """The gradient of x; w_{k+1} = inject(mix(couple(w_k)))."""
        for k in reversed(range(self.count)):
            w, layers = self.read[k], self._layers(k)
            coupled = w
            for _, _, h in layers[1:]:
                coupled = self._couple(coupled, h)
            if k == self.count - 1:
                dcoupled, dh = self._couple_backward(dy, dlogdet, coupled, layers[0][2])
            else:
                after = self.read[k + 1]
                dcoupled, dh, draw = self._step_backward(k + 1, dy, dlogdet, coupled, after, layers[0][2], self.raws[k + 1])
                self._injector_backward(k + 1, draw)
            dheads, dw = [dh], dcoupled
            for _, _, h in layers[1:]:
                dw, dh = self._couple_backward(dcoupled, dlogdet, w, h)
                dheads.append(dh)
            dy = self._networks_backward(k, w, layers, dheads, dw)
        dx, _, draw = self._step_backward(0, dy, dlogdet, self.x, self.read[0], None, self.raws[0])
        self._injector_backward(0, draw)
        return dx

    def decoding(self, dy: Tensor, dlogdet: Tensor) -> Tensor:
        """The gradient of x; y_{k-1} = mix⁻¹(inject⁻¹(couple⁻¹(y_k)))."""
        for k in range(self.count):
            layers, states = self._layers(k), [self.read[k]]
            for _, _, h in layers:
                states.append(self._couple(states[-1], h))
            after = self.read[k - 1] if k else self.y
            dstate, draw, _ = self._step_backward(k, dy, dlogdet, states.pop(), after, self.raws[k], None)
            self._injector_backward(k, draw)
            dheads = []
            for _, _, h in reversed(layers):
                dstate, dh = self._couple_backward(dstate, dlogdet, states.pop(), h)
                dheads.insert(0, dh)
            dy = self._networks_backward(k, self.read[k], layers, dheads, dstate)
        return dy

    def _layers(self, k: int) -> list[Layers]:
        """Hidden layers and output of the step's coupling network, then of its noise coupling's where it has one."""
        if self.layers:
            return self.layers[k]
        z1 = _z1(self.read[k])
        return [network.layers(net, z1, pre, self.settings.backend, self.settings.method) for net, pre in self.nets[k]]

    def _couple(self, x: Tensor, h: Tensor) -> Tensor:
        return self.kernels.affine_fwd(x, h, x.shape[1] // 2, self.settings.eps, self.settings.inverse)[0]

    def _couple_backward(self, dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        kept, eps, inverse = x.shape[1] // 2, self.settings.eps, self.settings.inverse
        return self.kernels.affine_bwd(dy, dlogdet, x, h, kept, eps, inverse)

    def _step_backward(
        self, k: int, dy: Tensor, dlogdet: Tensor, x: Tensor, y: Tensor, pre: Tensor | None, post: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x and of what the affines before and after the matrix shift and scale by."""
        mix, eps, inverse = self.level.mix[k], self.settings.eps, self.settings.inverse
        dx, dmix, doffset, dpre, dpost = self.kernels.step_bwd(dy, dlogdet, x, y, mix, pre, post, eps, inverse)
        self.dmix[k], self.doffset[k] = dmix, doffset
        return dx, dpre, dpost

    def _networks_backward(self, k: int, x: Tensor, layers: list[Layers], dheads: list[Tensor], dx: Tensor) -> Tensor:
        """dx with what the step's networks add to it, they too having read z1."""
        for index, ((net, _), (h1, h2, _), dh) in enumerate(zip(self.nets[k], layers, dheads)):
            dpre = self.dpres[k][index]
            dz1, dnet = network.gradients(net, _z1(x), h1, h2, dh, self.weights, self.settings.method, dpre)
            _z1(dx).add_(dz1)
            # the noise couplings are those of the last steps
            position = k if index == 0 else k - self.count + len(self.level.noise_couplings.w2)
            _store(self.dnetworks[1 + index], dnet, position)
        return dx

    def _injector_backward(self, k: int, draw: Tensor) -> None:
        net, pre = self.injectors[k]
        if self.h2_of_injectors:
            h1, h2 = F.relu(pre), self.h2_of_injectors[k]
        else:
            h1, h2 = network.hidden(net, None, pre, self.settings.method)
        dpre = self.dpre_injectors[k]
        _, dnet = network.gradients(net, None, h1, h2, draw, self.weights, self.settings.method, dpre)
        _store(self.dnetworks[0], dnet, k)


def _z1(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def _empty(networks: Tensors, wanted: bool) -> Networks:
    return Networks(*(torch.empty_like(t) if wanted and t is not None else None for t in networks))


def _store(stacked: Networks, gradients: Network | None, index: int) -> None:
    if gradients is not None:
        for stack, gradient in zip(stacked, gradients):
            if stack is not None:
                stack[index] = gradient


_level_pass = Piece("LevelPass", forward=_forward, backward=_backward, reference=_reference)
