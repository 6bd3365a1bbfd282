"""One level of the flow: squeeze, plain steps, conditional steps, split (SRFlow, Lugmayr et al. 2020; NCSR, Kim & Son 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast import ops
from ncsr_fast.engine.cache import Cache
from ncsr_fast.nn.actnorm import initialize_actnorm
from ncsr_fast.nn.networks import Network, StackedNetworks, zeros_conv


class Step(NamedTuple):
    """The parameters of one step, in the order in which encoding applies them."""

    bias: Tensor  # actnorm (C,)
    logs: Tensor
    weight: Tensor  # 1×1 convolution (C, C)
    injector: Network | None = None
    noise_coupling: Network | None = None
    coupling: Network | None = None


class Part(NamedTuple):
    """A part of a step that was encoded."""

    name: str
    h: Tensor | None  # what its network, if it has one, made of the state before
    z: Tensor  # the state after it
    logdet: Tensor  # (B,)


class FlowLevel(nn.Module):
    """`transition_steps` plain steps (actnorm + 1×1 convolution), then `steps` conditional ones, then a split.

    A conditional step, encoding: x → actnorm → 1×1 convolution → injector(u) → [noise coupling(z1, v)]
    → coupling(z1, u). u (B, condition, h, w) are the conditioning features, v (B, noise_channels, h, w) the
    noise at the level's resolution, and the last `noise_steps` steps have the noise coupling.

    `encode` and `decode` are the definition, step by step; `ncsr_fast.engine.fused_level` computes the same.

    The actnorms and 1×1 convolutions of all steps are stacked, the transition steps first:
    `actnorm_bias`, `actnorm_logs` (T+K, C), `invconv` (T+K, C, C). So are the networks.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        transition_steps: int,
        condition_channels: int,
        hidden_channels: int,
        noise_channels: int,
        noise_steps: int,
        split_channels: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.channels, self.steps, self.transition_steps = channels, steps, transition_steps
        self.noise_steps, self.split_channels, self.eps = noise_steps, split_channels, eps
        self.kept = channels // 2  # channels of z1, which a coupling reads and leaves alone
        count = transition_steps + steps
        self.actnorm_bias = nn.Parameter(torch.zeros(count, channels))
        self.actnorm_logs = nn.Parameter(torch.zeros(count, channels))
        self.invconv = nn.Parameter(torch.stack([_random_rotation(channels) for _ in range(count)]))
        changed = 2 * (channels - self.kept)
        self.injectors = StackedNetworks(steps, condition_channels, hidden_channels, 2 * channels)
        self.couplings = StackedNetworks(steps, self.kept + condition_channels, hidden_channels, changed)
        self.noise_couplings = (
            StackedNetworks(noise_steps, self.kept + noise_channels, hidden_channels, changed) if noise_steps else None
        )
        if split_channels:
            kept = channels - split_channels
            self.split_weight = nn.Parameter(torch.zeros(2 * split_channels, kept, 3, 3))
            self.split_bias = nn.Parameter(torch.zeros(2 * split_channels))
            self.split_logs = nn.Parameter(torch.zeros(2 * split_channels))
        self.cache = Cache()  # of what the engine makes of the parameters

    def encode(
        self, z: Tensor, u: Tensor, v: Tensor | None, initialize: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z (B, C/4, 2h, 2w) → state of the next level, the split's latent (None without one), logdet (B,).

        With `initialize`, every actnorm is set from the data that reaches it, before it is applied.
        """
        z = F.pixel_unshuffle(z, 2)
        logdets = []
        for step in self.unbind():
            z, logdet = self.encode_step(step, z, u, v, initialize, backend)
            logdets.append(logdet)
        latent = None
        if self.split_channels:
            z, logdet = ops.gaussian_split(z, self._prior(z[:, : -self.split_channels]), backend=backend)
            logdets.append(logdet)
            z, latent = z[:, : -self.split_channels], z[:, -self.split_channels :]
        return z, latent, torch.stack(logdets).sum(dim=0)

    def decode(
        self, z: Tensor, latent: Tensor | None, u: Tensor, v: Tensor | None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`: state of the next level and the split's latent → z and logdet (B,)."""
        logdets = []
        if self.split_channels:
            z, logdet = self.undo_split(z, latent, backend)
            logdets.append(logdet)
        for step in reversed(self.unbind()):
            z, logdet = self.decode_step(step, z, u, v, backend)
            logdets.append(logdet)
        return F.pixel_shuffle(z, 2), torch.stack(logdets).sum(dim=0)

    def encode_step(
        self, step: Step, z: Tensor, u: Tensor, v: Tensor | None, initialize: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """One step of the squeezed state z (B, C, h, w)."""
        parts = self.encode_parts(step, z, u, v, initialize, backend)
        return parts[-1].z, torch.stack([part.logdet for part in parts]).sum(dim=0)

    def encode_parts(
        self, step: Step, z: Tensor, u: Tensor, v: Tensor | None, initialize: bool = False, backend: str = "auto"
    ) -> list[Part]:
        """The parts of one step, in encoding order."""
        if initialize:
            initialize_actnorm(step.bias, step.logs, z)
        z, logdet = ops.actnorm_invconv(z, step.bias, step.logs, step.weight, backend=backend)
        parts = [Part("actnorm and 1×1 convolution", None, z, logdet)]
        if step.injector is None:
            return parts
        h = step.injector(u, initialize)
        z, logdet = ops.affine_injector(z, h, self.eps, backend=backend)
        parts.append(Part("injector", h, z, logdet))
        for name, network, condition in couplings(step, u, v):
            h = network(self.joined(z, condition), initialize)
            z, logdet = ops.affine_coupling(z, h, self.eps, backend=backend)
            parts.append(Part(name, h, z, logdet))
        return parts

    def decode_step(self, step: Step, z: Tensor, u: Tensor, v: Tensor | None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """The inverse of `encode_step`."""
        logdets = []
        if step.injector is not None:
            for _, network, condition in reversed(couplings(step, u, v)):
                h = network(self.joined(z, condition))
                z, logdet = ops.affine_coupling(z, h, self.eps, inverse=True, backend=backend)
                logdets.append(logdet)
            z, logdet = ops.affine_injector(z, step.injector(u), self.eps, inverse=True, backend=backend)
            logdets.append(logdet)
        z, logdet = ops.actnorm_invconv(z, step.bias, step.logs, step.weight, inverse=True, backend=backend)
        return z, torch.stack([*logdets, logdet]).sum(dim=0)

    def undo_split(self, z: Tensor, latent: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """The state before the split, and the log-det (B,) of undoing it."""
        return ops.gaussian_split(torch.cat([z, latent], dim=1), self._prior(z), inverse=True, backend=backend)

    def unbind(self) -> list[Step]:
        """The steps, in encoding order."""
        injectors, couplings = self.injectors.unbind(), self.couplings.unbind()
        noise = self.noise_couplings.unbind() if self.noise_couplings is not None else []
        noise = [None] * (self.steps - self.noise_steps) + noise
        plain = [(None, None, None)] * self.transition_steps
        networks = plain + list(zip(injectors, noise, couplings))
        mixing = zip(self.actnorm_bias.unbind(), self.actnorm_logs.unbind(), self.invconv.unbind())
        return [Step(*mix, *nets) for mix, nets in zip(mixing, networks)]

    def joined(self, z: Tensor, condition: Tensor) -> Tensor:
        """What a coupling network reads."""
        return torch.cat([z[:, : self.kept], condition], dim=1)

    def _prior(self, z1: Tensor) -> Tensor:
        return zeros_conv(z1, self.split_weight, self.split_bias, self.split_logs)


def couplings(step: Step, u: Tensor, v: Tensor | None) -> list[tuple[str, Network, Tensor]]:
    """The couplings of a step: the name of each, its network and what that is conditioned on, in encoding order."""
    noise = [] if step.noise_coupling is None else [("noise coupling", step.noise_coupling, v)]
    return [*noise, ("coupling", step.coupling, u)]


def _random_rotation(channels: int) -> Tensor:
    """A rotation in the default dtype, which may be one that PyTorch decomposes no matrices of."""
    normal = torch.randn(channels, channels)
    return torch.linalg.qr(normal.double())[0].to(normal.dtype)
