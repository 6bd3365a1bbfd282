"""The decoder of a model as a module of PyTorch's own operators, which exporters understand.

Everything that depends on the weights alone is a constant of it: actnorms and exp-scales are folded into the convolutions, and
the 1×1 convolutions are inverted. The remaining operations are convolutions, ReLUs, and one sigmoid and one division per
coupling.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncsr_fast.config import NCSRConfig
from ncsr_fast.engine.folding import Networks, fold_mixing, fold_networks, is_deep
from ncsr_fast.engine.plan import folded_split
from ncsr_fast.flow.walk import downward
from ncsr_fast.ops.conv3x3 import convolution

if TYPE_CHECKING:
    from ncsr_fast.flow.level import FlowLevel
    from ncsr_fast.model import NCSR


class Decoder(nn.Module):
    """`decoder(lr, *latents)` → sr (B, 3, sH, sW), what `model.decode(latents, lr)` computes: the noise condition is zero.

    It has copies of the weights, as buffers: changes of the model do not reach it. No gradients of the weights.

    Args:
        lr: (B, 3, H, W), RGB in [0, 1], or as the model wants it; H and W multiples of `multiple`, for most models even
            (`NCSR` pads others; here it is left to the caller).
        latents: As `model.latent_shapes(H, W)` has them, drawn from N(0, temperature²), the top one around the mean of the
            prior where the model has one; with `deterministic` there are none: they are zero, and `decoder(lr)` is the image
            of temperature 0.
        clip: To [0, 1] as `model.sample` does, which adds the base before where the model has one: a pixel that overflowed is
            NaN. False: as `model.decode` does.

    Raises:
        ValueError: Weights that are not finite, or a 1×1 convolution without an inverse.
    """

    def __init__(self, model: NCSR, deterministic: bool = False, clip: bool = True) -> None:
        super().__init__()
        if not isinstance(model.config, NCSRConfig):
            raise ValueError("only models of an NCSRConfig can be exported, and this model has a FlowConfig")
        self.deterministic, self.clip = deterministic, clip
        self.multiple, self.lr_channels = model.flow.lr_multiple, model.flow.lr_channels
        self.base = model.flow.base if clip else None
        shapes = model.latent_shapes(self.multiple, self.multiple)
        self.latents = [(channels, side) for channels, side, _ in shapes]  # side to `multiple` LR pixels
        self.inputs = [] if deterministic else [f"latent{index}" for index in range(len(self.latents))]  # beside lr
        self.encoder = copy.deepcopy(model.encoder)
        _drop(self.encoder, self.encoder.head())
        with torch.no_grad():
            self.levels = nn.ModuleList(_Level(level) for level in model.levels)
        self.eval().requires_grad_(False)
        for name, value in self.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"the model cannot be exported: {name}, computed from its weights, is not finite")

    def example(self, batch: int, rows: int, columns: int) -> list[Tensor]:
        """Return lr, of `multiple` times these rows and columns, and latents: a smooth image, temperature 0.5."""
        like, generator = self.encoder.conv_first.weight, torch.Generator().manual_seed(0)
        corners = torch.rand(batch, self.lr_channels, 2, 2, generator=generator, device="cpu")
        lr = F.interpolate(corners, size=(self.multiple * rows, self.multiple * columns), mode="bilinear")
        latents = [
            0.5 * torch.randn((batch, channels, side * rows, side * columns), generator=generator, device="cpu")
            for channels, side in self.latents[: len(self.inputs)]
        ]
        return [tensor.to(like) for tensor in (lr, *latents)]

    def dynamic_shapes(self) -> dict[str, Any]:
        """What torch.export is told: batch, and height and width of LR over `multiple`, are free."""
        batch, h, w = torch.export.Dim("batch", min=1), torch.export.Dim("h", min=2), torch.export.Dim("w", min=2)
        latents = tuple({0: batch, 2: side * h, 3: side * w} for _, side in self.latents[: len(self.inputs)])
        return {"lr": {0: batch, 2: self.multiple * h, 3: self.multiple * w}, **({"latents": latents} if latents else {})}

    def forward(self, lr: Tensor, *latents: Tensor) -> Tensor:
        """The HR images (B, 3, sH, sW) of LR images and latents."""
        if self.deterministic:
            sizes = lr.shape[2] // self.multiple, lr.shape[3] // self.multiple
            latents = tuple(lr.new_zeros(lr.shape[0], c, *(side * size for size in sizes)) for c, side in self.latents)
        features, mean = self.encoder.condition(lr, None)
        z = latents[-1] if mean is None else latents[-1] + mean
        for index, level, latent in downward(self.levels, latents):
            z = level(z, latent, features[index].joined)
        if self.base is not None:
            z = z + F.interpolate(lr, size=z.shape[2:], mode=self.base, align_corners=False)
        return torch.where(z.isfinite(), z.clamp(0, 1), torch.nan) if self.clip else z


def _drop(module: nn.Module, parts: list[nn.Module]) -> None:
    """Put an identity in the place of modules inside a module, which has no use for them."""
    for name, child in module.named_children():
        if any(child is part for part in parts):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, parts)


class _Level(nn.Module):
    """`FlowLevel.decode` with zero noise and without the log-det: state of the next level → state of this level's input."""

    def __init__(self, level: FlowLevel) -> None:
        super().__init__()
        self.eps, self.squeeze, self.split_channels = level.eps, level.squeeze, level.split_channels
        dtype = level.actnorm_bias.dtype
        pairs = [
            fold_networks(level.networks(branch), 0 if branch.changes_all else level.pass_through, dtype)
            for branch in level.branches
        ]
        residuals = [level.networks(branch).residual for branch in level.branches]
        mixing = fold_mixing(level.actnorm_bias, level.actnorm_logs, level.invconv, level.transition_steps, inverse=True)
        self.split = _Convolution(*_halves(*folded_split(level))) if level.split_channels else None
        self.changed = level.channels - level.pass_through
        hoisted = [hoisted for branch, (_, hoisted) in zip(level.branches, pairs) if branch.condition == "features"]
        # the part of all networks' first layers that sees u: one convolution
        self.hoisted = _Convolution(torch.cat([h.weight for h in hoisted]), torch.cat([h.bias for h in hoisted]))
        self.hoists = [branch.condition == "features" for branch in level.branches]
        self.branches = [branch.name for branch in level.branches]
        for name, (networks, hoisted), hoists, residual in zip(self.branches, pairs, self.hoists, residuals):
            biases = hoisted.bias.chunk(len(networks.w2))
            # of zero noise, or of no condition, only the bias of the first layer is left
            parts = (_Network(networks, index, residual, None if hoists else bias) for index, bias in enumerate(biases))
            setattr(self, name, nn.ModuleList(parts))
        self.mixes = nn.ModuleList(
            _Convolution(mix[:, :, None, None], offset) for mix, offset in zip(mixing.mix, mixing.offset)
        )

    def forward(self, z: Tensor, latent: Tensor | None, u: Tensor) -> Tensor:
        if self.split is not None:
            mean, logs = self.split(z).chunk(2, dim=1)
            z = torch.cat([z, mean + torch.exp(logs) * latent], dim=1)
        branches = [getattr(self, name) for name in self.branches]
        count = sum(len(networks) for networks, hoists in zip(branches, self.hoists) if hoists)
        hoisted = iter(self.hoisted(u).chunk(count, dim=1))
        pres = [[next(hoisted) if hoists else None for _ in networks] for networks, hoists in zip(branches, self.hoists)]
        for left in range(1, len(self.mixes) + 1):
            for networks, own in reversed(list(zip(branches, pres))):
                if left <= len(networks):
                    z = self._undo(networks[len(networks) - left], z, own[len(networks) - left])
            z = self.mixes[len(self.mixes) - left](z)
        return F.pixel_shuffle(z, self.squeeze) if self.squeeze > 1 else z

    def _undo(self, network: _Network, z: Tensor, pre: Tensor | None) -> Tensor:
        """The inverse of a branch's affine map, z / scale - shift, for the channels that the branch changes."""
        pass_through = z.shape[1] - self.changed if network.sees_state else 0
        z1, z2 = z[:, :pass_through], z[:, pass_through:]
        shift, raw = network(z1 if pass_through else None, pre).chunk(2, dim=1)
        z2 = z2 / (torch.sigmoid(raw) + self.eps) - shift
        return torch.cat([z1, z2], dim=1) if pass_through else z2


class _Network(nn.Module):
    """One of the stacked networks: (z1, pre) → shift and, shifted by 2, what the scale is the sigmoid of.

    Args:
        residual: Of a deep network with residuals, the layers inside each; 0: none.
        bias: Of the first layer, where nothing is hoisted from it.
    """

    def __init__(self, networks: Networks, index: int, residual: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.sees_state, self.residual = networks.w1 is not None, residual
        self.first = _Convolution(networks.w1[index], bias) if self.sees_state else None
        w2, b2 = networks.w2[index], networks.b2[index]
        layers = zip(w2, b2) if is_deep(networks.w2) else [(w2, b2)]
        self.hidden = nn.ModuleList(_Convolution(*layer) for layer in layers)
        weight, bias = _halves(networks.w3[index], networks.b3[index])
        bias[len(bias) // 2 :] += 2
        self.last = _Convolution(weight, bias)

    def forward(self, z1: Tensor | None, pre: Tensor | None) -> Tensor:
        x = pre if z1 is None else self.first(z1) if pre is None else self.first(z1) + pre
        x = start = F.relu(x)
        for index, layer in enumerate(self.hidden, start=1):
            x = F.relu(layer(x))
            if self.residual and index % self.residual == 0:
                x = start = start + x
        return self.last(x)


class _Convolution(nn.Module):
    """A convolution that preserves the size, with constant weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return convolution(x, self.weight, self.bias, None)


def _halves(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution with its even outputs first, then the odd ones; the published order alternates shifts and scales."""
    return torch.cat([weight[0::2], weight[1::2]]), torch.cat([bias[0::2], bias[1::2]])
