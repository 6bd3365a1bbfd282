"""A level: squeeze, transition steps, conditional steps, split (SRFlow, Lugmayr et al. 2020; NCSR, Kim & Son 2021)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast import ops
from ncsr_fast.config import CONDITIONS, Branch, LevelConfig
from ncsr_fast.engine.cache import Cache
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.engine.plan import Window, within
from ncsr_fast.flow.actnorm import initialize_actnorm
from ncsr_fast.flow.networks import NETWORKS, DeepNetwork, DeepNetworks, Network, StackedNetworks, zeros_conv
from ncsr_fast.ops.contract import pass_through_channels
from ncsr_fast.ops.reference import affine_logdet


class Step(NamedTuple):
    """The parameters of one step, in the order in which encoding applies them.

    Args:
        bias: Actnorm's bias (C,).
        logs: Actnorm's logs (C,).
        weight: The 1×1 convolution's weight (C, C).
        branches: The branches, each with its network of this step; none in a transition step.
    """

    bias: Tensor
    logs: Tensor
    weight: Tensor
    branches: tuple[tuple[Branch, Network | DeepNetwork], ...] = ()


class Part(NamedTuple):
    """The result of one part of a step in encoding.

    Args:
        name: Name of the part, for messages.
        h: Output of the part's network, None for actnorm and 1×1 convolution.
        z: The state after the part.
        logdet: The part's log-det (B,).
    """

    name: str
    h: Tensor | None
    z: Tensor
    logdet: Tensor


class FlowLevel(nn.Module):
    """A level: `transition_steps` of actnorm + 1×1 convolution, then `steps` conditional steps, then a split.

    A conditional step is actnorm, 1×1 convolution and branches, in the order of the configuration. For NCSR it is
    x → actnorm → 1×1 convolution → injector(u) → [noise coupling(z1, v)] → coupling(z1, u), where u (B, condition, h, w) are
    the features and v (B, noise_channels, h, w) is the noise at the level's resolution.

    `encode` and `decode` are the reference, step by step; `ncsr_fast.engine.plan` computes the same.

    The actnorms and 1×1 convolutions of all steps are stacked, the transition steps first: `actnorm_bias`, `actnorm_logs`
    (T+K, C), `invconv` (T+K, C, C). The networks of a branch are stacked too, in the attribute with the branch's name.

    Args:
        config: The level.
        channels: C, after the squeeze.
        hidden_channels: Width of the networks.
        noise_channels: Channels of v.
        eps: Lower bound of the scales.
    """

    def __init__(
        self, config: LevelConfig, channels: int, hidden_channels: int, noise_channels: int = 0, eps: float = 1e-4
    ) -> None:
        super().__init__()
        self.config, self.channels, self.eps, self.noise_channels = config, channels, eps, noise_channels
        self.steps, self.transition_steps, self.squeeze = config.steps, config.transition_steps, config.squeeze
        self.branches, self.split_channels = config.branches, config.split_channels
        self.pass_through = pass_through_channels(channels)
        self.cache = Cache()  # of values that the engine computes from the parameters
        count = self.transition_steps + self.steps
        self.actnorm_bias = nn.Parameter(torch.zeros(count, channels))
        self.actnorm_logs = nn.Parameter(torch.zeros(count, channels))
        self.invconv = nn.Parameter(torch.stack([_random_rotation(channels) for _ in range(count)]))
        widths = {"features": config.condition_channels, "noise": noise_channels, None: 0}
        # branches by condition, as the engine evaluates the networks' first layers
        for branch in sorted(self.branches, key=lambda branch: CONDITIONS.index(branch.condition)):
            self._check_name(branch)
            inputs = widths[branch.condition] + (0 if branch.changes_all else self.pass_through)
            outputs = 2 * (channels if branch.changes_all else channels - self.pass_through)
            setattr(self, branch.name, NETWORKS[branch.network](branch.steps, inputs, hidden_channels, outputs))
        # True if the engine has kernels for all networks
        self.has_kernels = all([isinstance(self.networks(branch), (StackedNetworks, DeepNetworks)) for branch in self.branches])
        if self.split_channels:
            left = channels - self.split_channels
            self.split_weight = nn.Parameter(torch.zeros(2 * self.split_channels, left, 3, 3))
            self.split_bias = nn.Parameter(torch.zeros(2 * self.split_channels))
            self.split_logs = nn.Parameter(torch.zeros(2 * self.split_channels))

    def _check_name(self, branch: Branch) -> None:
        if hasattr(self, branch.name) or branch.name in ("split_weight", "split_bias", "split_logs"):
            raise ValueError(f"a branch cannot be called {branch.name!r}: a level has an attribute of that name")
        if branch.network not in NETWORKS:
            raise ValueError(f"branch {branch.name}: no networks of kind {branch.network!r}; there are {', '.join(NETWORKS)}")

    def networks(self, branch: Branch) -> Any:
        """The networks of a branch: `StackedNetworks`, `DeepNetworks`, or a module of another kind."""
        return getattr(self, branch.name)

    def encode(
        self,
        z: Tensor,
        u: Tensor,
        v: Tensor | None,
        initialize: bool = False,
        backend: str = "auto",
        window: Window | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The next level's state, the split's latent (None without a split) and logdet (B,), from z (B, C/s², s·h, s·w).

        With `initialize`, every actnorm is set from its input before it is applied. With `window`, results are those of its
        rows and columns.
        """
        z = self.squeezed(z)
        logdets = []
        for step in self.unbind():
            if window is None:
                z, logdet = self.encode_step(step, z, u, v, initialize, backend)
                logdets.append(logdet)
                continue
            parts = self.encode_parts(step, z, u, v, initialize, backend)
            z = parts[-1].z
            logdets += [self._logdet_within(part, window) for part in parts]
        latent = None
        if self.split_channels:
            h = within(self._prior(z[:, : -self.split_channels]), window)
            z, logdet = ops.gaussian_split(within(z, window), h, backend=backend)
            logdets.append(logdet)
            z, latent = z[:, : -self.split_channels], z[:, -self.split_channels :]
        else:
            z = within(z, window)
        return z, latent, torch.stack(logdets).sum(dim=0)

    def _logdet_within(self, part: Part, window: Window) -> Tensor:
        """The log-det (B,) of a part of a step in the rows and columns of a window."""
        if part.h is not None:
            return affine_logdet(within(part.h, window), self.eps)
        return part.logdet * (within(part.z, window)[0, 0].numel() / part.z[0, 0].numel())  # the same in every pixel

    def decode(
        self,
        z: Tensor,
        latent: Tensor | None,
        u: Tensor,
        v: Tensor | None,
        backend: str = "auto",
        peaks: Peaks | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `encode`: state of the next level and the split's latent → z and logdet (B,).

        `peaks` are added those of the state after each conditional step; of the last one decoded, after the transition steps.
        """
        logdets = []
        if latent is not None:
            z, logdet = self.undo_split(z, latent, backend)
            logdets.append(logdet)
        for index, step in reversed(list(enumerate(self.unbind()))):
            z, logdet = self.decode_step(step, z, u, v, backend)
            logdets.append(logdet)
            if peaks is not None and (index > self.transition_steps or index == 0):
                peaks.add(z)
        return self.unsqueezed(z), torch.stack(logdets).sum(dim=0)

    def squeezed(self, z: Tensor) -> Tensor:
        """The state with blocks of pixels turned into channels."""
        return F.pixel_unshuffle(z, self.squeeze) if self.squeeze > 1 else z

    def unsqueezed(self, z: Tensor) -> Tensor:
        """The inverse of `squeezed`."""
        return F.pixel_shuffle(z, self.squeeze) if self.squeeze > 1 else z

    def encode_step(
        self, step: Step, z: Tensor, u: Tensor, v: Tensor | None, initialize: bool = False, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Apply one step to the squeezed state z (B, C, h, w)."""
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
        for branch, network in step.branches:
            h = network(self.network_input(branch, z, u, v), initialize)
            z, logdet = self._affine(branch, z, h, False, backend)
            parts.append(Part(branch.label, h, z, logdet))
        return parts

    def decode_step(self, step: Step, z: Tensor, u: Tensor, v: Tensor | None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """The inverse of `encode_step`."""
        logdets = []
        for branch, network in reversed(step.branches):
            z, logdet = self._affine(branch, z, network(self.network_input(branch, z, u, v)), True, backend)
            logdets.append(logdet)
        z, logdet = ops.actnorm_invconv(z, step.bias, step.logs, step.weight, inverse=True, backend=backend)
        return z, torch.stack([*logdets, logdet]).sum(dim=0)

    def undo_split(self, z: Tensor, latent: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """The state before the split, and the log-det (B,) of undoing it."""
        return ops.gaussian_split(torch.cat([z, latent], dim=1), self._prior(z), inverse=True, backend=backend)

    def unbind(self) -> list[Step]:
        """The steps, in encoding order."""
        networks = [(branch, self.networks(branch).unbind()) for branch in self.branches]
        steps = []
        for index, mix in enumerate(zip(self.actnorm_bias.unbind(), self.actnorm_logs.unbind(), self.invconv.unbind())):
            left = self.transition_steps + self.steps - index  # number of steps from this step on
            conditional = index >= self.transition_steps
            own = tuple((branch, nets[len(nets) - left]) for branch, nets in networks if conditional and left <= len(nets))
            steps.append(Step(*mix, own))
        return steps

    def network_input(self, branch: Branch, z: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        """The input of a branch's network: the condition, and for couplings the pass-through channels."""
        condition = {"features": u, "noise": v, None: None}[branch.condition]
        parts = [] if branch.changes_all else [z[:, : self.pass_through]]
        parts += [] if condition is None else [condition]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _affine(self, branch: Branch, z: Tensor, h: Tensor, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
        affine = ops.affine_injector if branch.changes_all else ops.affine_coupling
        return affine(z, h, self.eps, inverse=inverse, backend=backend)

    def _prior(self, z1: Tensor) -> Tensor:
        return zeros_conv(z1, self.split_weight, self.split_bias, self.split_logs)


def _random_rotation(channels: int) -> Tensor:
    """A random rotation in the default dtype, for which PyTorch may have no matrix decompositions."""
    normal = torch.randn(channels, channels)
    rotation: Tensor = torch.linalg.qr(normal.double())[0]
    return rotation.to(normal.dtype)
