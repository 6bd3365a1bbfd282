"""A network with the module tree, parameter names and call of the published NCSR and SRFlow programs, in plain PyTorch.

Written from the conformance README, the names and shapes of the conformance vectors and the papers, so that the drop-in is
tested without the published files. Unlike the published network it also decodes in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.inited = False

    def forward(self, input, logdet=None, reverse=False):
        if not self.inited and self.training:
            if not self.bias.any():
                with torch.no_grad():
                    self.bias.copy_(-input.mean(dim=(0, 2, 3), keepdim=True))
                    std = (input + self.bias).square().mean(dim=(0, 2, 3), keepdim=True).sqrt()
                    self.logs.copy_(-torch.log(std + 1e-6))
            self.inited = True
        y = input * torch.exp(-self.logs) - self.bias if reverse else (input + self.bias) * torch.exp(self.logs)
        change = self.logs.sum() * input.shape[2] * input.shape[3]
        return y, None if logdet is None else logdet - change if reverse else logdet + change


class InvertibleConv1x1(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.w_shape = [channels, channels]

    def forward(self, input, logdet=None, reverse=False):
        weight = torch.inverse(self.weight.double()).to(self.weight) if reverse else self.weight
        change = torch.slogdet(self.weight)[1] * input.shape[2] * input.shape[3]
        y = F.conv2d(input, weight[:, :, None, None])
        return y, None if logdet is None else logdet - change if reverse else logdet + change


class ConvActNorm(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
        nn.init.normal_(self.weight, std=0.05)
        self.actnorm = ActNorm2d(outputs)

    def forward(self, x):
        return self.actnorm(super().forward(x))[0]


class ZeroConv(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.logs = nn.Parameter(torch.zeros(outputs, 1, 1))

    def forward(self, x):
        return super().forward(x) * torch.exp(3 * self.logs)


def small_network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    first, second = ConvActNorm(inputs, hidden, 3), ConvActNorm(hidden, hidden, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), ZeroConv(hidden, outputs))


class Coupling(nn.Module):
    """The injector, the noise coupling and the coupling of a step."""

    def __init__(self, channels: int, condition: int, hidden: int, noise: int, stdmode: bool) -> None:
        super().__init__()
        self.kept, self.noise, self.affine_eps = channels // 2, noise, 1e-4
        changed = 2 * (channels - self.kept)
        self.fAffine = small_network(self.kept + condition, hidden, changed)
        self.fFeatures = small_network(condition, hidden, 2 * channels)
        if noise:
            self.fAffine_std = small_network(self.kept + noise, hidden, changed)
            self.stdmode = stdmode

    def _affine(self, z: Tensor, h: Tensor, kept: int, reverse: bool) -> tuple[Tensor, Tensor]:
        shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2) + self.affine_eps
        z1, z2 = z[:, :kept], z[:, kept:]
        z2 = z2 / scale - shift if reverse else (z2 + shift) * scale
        change = scale.log().sum(dim=(1, 2, 3))
        return torch.cat([z1, z2], dim=1), -change if reverse else change

    def forward(self, z, logdet, reverse, ft, std):
        couplings = [(self.fFeatures, 0, None), (self.fAffine, self.kept, ft)]
        if std is not None and self.stdmode:
            size = z.shape[2:]
            v = F.interpolate(std, size=size, mode="bicubic") if std.shape[1] == 3 else std.expand(-1, self.noise, *size)
            couplings.insert(1, (self.fAffine_std, self.kept, v))
        for network, kept, condition in couplings[::-1] if reverse else couplings:
            h = network(ft if condition is None else torch.cat([z[:, :kept], condition], dim=1))
            z, change = self._affine(z, h, kept, reverse)
            logdet = logdet + change
        return z, logdet


class FlowStep(nn.Module):
    def __init__(self, channels: int, coupling: Coupling | None) -> None:
        super().__init__()
        self.actnorm, self.invconv = ActNorm2d(channels), InvertibleConv1x1(channels)
        if coupling is not None:
            self.affine = coupling

    def forward(self, z, logdet, reverse, ft, std):
        coupled = hasattr(self, "affine")
        if reverse and coupled:
            z, logdet = self.affine(z, logdet, True, ft, std)
        for layer in (self.invconv, self.actnorm) if reverse else (self.actnorm, self.invconv):
            z, logdet = layer(z, logdet, reverse)
        if not reverse and coupled:
            z, logdet = self.affine(z, logdet, False, ft, std)
        return z, logdet


class Squeeze(nn.Module):
    factor = 2


class Split(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ZeroConv(channels - channels // 2, channels // 2 * 2)
        self.kept, self.logs_eps, self.position = channels - channels // 2, 0, None

    def density(self, z1, z2, eps=None):
        h = self.conv(z1)
        mean, logs = h[:, 0::2], h[:, 1::2]
        z2 = mean + torch.exp(logs) * eps.to(mean) if z2 is None else z2
        eps = (z2 - mean) / torch.exp(logs)
        return z2, eps, (-0.5 * eps.square() - logs - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3))


class Flow(nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        flow, scale = options["network_G"]["flow"], options["scale"]
        condition = options["network_G"]["nf"] * (1 + len(flow["stackRRDB"]["blocks"]))
        hidden, noise = flow["CondAffineSeparatedAndCond"]["hidden_channels"], flow.get("std_channels", 0)
        self.scale, levels, channels = scale, scale.bit_length(), 3
        self.layers, self.level_of = nn.ModuleList(), []
        for level in range(1, levels + 1):
            channels *= 4
            steps = [FlowStep(channels, None) for _ in range(flow["additionalFlowNoAffine"])]
            for k in range(flow["K"]):
                used = noise > 0 and flow["S"][level - 1] >= flow["K"] - k
                steps.append(FlowStep(channels, Coupling(channels, condition, hidden, noise, used)))
            layers = [Squeeze(), *steps]
            if level < levels - 1:
                layers.append(Split(channels))
                channels -= channels // 2
            self.layers.extend(layers)
            self.level_of += [level] * len(layers)
        self.f = nn.Sequential(nn.Conv2d(condition, 96, 3, padding=1))


class RDB(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for index in range(5):
            outputs = channels if index == 4 else growth
            setattr(self, f"conv{index + 1}", nn.Conv2d(channels + index * growth, outputs, 3, padding=1))
        self.lrelu = nn.LeakyReLU(0.2)

    def forward(self, x):
        found = [x]
        for index in range(4):
            found.append(self.lrelu(getattr(self, f"conv{index + 1}")(torch.cat(found, dim=1))))
        return x + 0.2 * self.conv5(torch.cat(found, dim=1))


class Block(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.RDB1, self.RDB2, self.RDB3 = (RDB(channels, growth) for _ in range(3))

    def forward(self, x):
        return x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: int, growth: int, blocks: int, scale: int) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(Block(channels, growth) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.doublings = scale.bit_length() - 1
        for index in range(self.doublings):
            setattr(self, f"upconv{index + 1}", nn.Conv2d(channels, channels, 3, padding=1))
        self.HRconv, self.conv_last = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.lrelu = nn.LeakyReLU(0.2)

    def forward(self, x, stacked):
        """Features by name: what the flow reads, each with the stacked block outputs."""
        fea, outputs = self.conv_first(x), []
        for block in self.RRDB_trunk:
            fea = block(fea)
            outputs.append(fea)
        fea = fea + self.trunk_conv(fea)
        found = {"fea_up1": fea, "fea_up0": F.avg_pool2d(fea, 2)}
        for index in range(self.doublings):
            fea = self.lrelu(getattr(self, f"upconv{index + 1}")(F.interpolate(fea, scale_factor=2)))
            found[f"fea_up{2 ** (index + 1)}"] = fea
        joined = torch.cat([outputs[index] for index in stacked], dim=1)
        return {name: torch.cat([own, F.interpolate(joined, size=own.shape[2:])], dim=1) for name, own in found.items()}


class StandIn(nn.Module):
    """SRFlow; `StandInNCSR` is called with a noise condition as well."""

    def __init__(self, options: dict) -> None:
        super().__init__()
        self.opt, self.quant, self.calls = options, 32, 0
        network = options["network_G"]
        self.RRDB = Encoder(network["nf"], network["gc"], network["nb"], options["scale"])
        self.flowUpsamplerNet = Flow(options)

    def rrdbPreprocessing(self, lr):
        return self.RRDB(lr, self.opt["network_G"]["flow"]["stackRRDB"]["blocks"])

    def forward(
        self, gt=None, lr=None, z=None, eps_std=None, reverse=False, epses=None, reverse_with_grad=False, lr_enc=None,
        add_gt_noise=False, step=None, y_label=None,
    ):  # fmt: skip
        return self.run(gt, lr, z, eps_std, reverse, epses, reverse_with_grad, lr_enc, add_gt_noise, None)

    def run(self, gt, lr, z, eps_std, reverse, epses, reverse_with_grad, lr_enc, add_gt_noise, std):
        self.calls += 1
        if not reverse:
            return self.encode(gt, self.rrdbPreprocessing(lr) if lr_enc is None else lr_enc, epses, add_gt_noise, std)
        with torch.set_grad_enabled(torch.is_grad_enabled() and reverse_with_grad):
            features = self.rrdbPreprocessing(lr) if lr_enc is None else lr_enc
            return self.decode(lr, features, z, eps_std, epses, add_gt_noise, std)

    def encode(self, gt, features, epses, add_gt_noise, std):
        z, logdet, pixels = gt, gt.new_zeros(len(gt)), gt.shape[2] * gt.shape[3]
        if add_gt_noise:
            z = z + (torch.rand(z.shape) - 0.5) / self.quant
            logdet = logdet - math.log(self.quant) * pixels
        latents = []
        for layer, level in zip(self.flowUpsamplerNet.layers, self.flowUpsamplerNet.level_of):
            if isinstance(layer, Squeeze):
                z = F.pixel_unshuffle(z, 2)
            elif isinstance(layer, Split):
                z, z2 = z[:, : layer.kept], z[:, layer.kept :]
                _, eps, density = layer.density(z, z2)
                latents.append(eps)
                logdet = logdet + density
            else:
                z, logdet = layer(z, logdet, False, features[f"fea_up{self.opt['scale'] >> level}"], std)
        density = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3))
        nll = -(logdet + density) / (math.log(2) * pixels)
        if isinstance(epses, list):
            epses.extend([*latents, z])
            z = epses
        return z, nll, logdet

    def decode(self, lr, features, z, eps_std, epses, add_gt_noise, std):
        given = list(epses) if isinstance(epses, list) else None
        z = z if given is None else given.pop()
        logdet = lr.new_zeros(len(lr))
        if add_gt_noise:
            logdet = logdet + math.log(self.quant) * lr.shape[2] * lr.shape[3] * self.opt["scale"] ** 2
        for layer, level in zip(self.flowUpsamplerNet.layers[::-1], self.flowUpsamplerNet.level_of[::-1]):
            if isinstance(layer, Squeeze):
                z = F.pixel_shuffle(z, 2)
            elif isinstance(layer, Split):
                shape = (len(z), layer.conv.bias.shape[0] // 2, *z.shape[2:])
                eps = torch.normal(torch.zeros(shape), eps_std * torch.ones(shape)) if given is None else given.pop()
                z2, _, density = layer.density(z, None, eps)
                z, logdet = torch.cat([z, z2], dim=1), logdet - density
            else:
                z, logdet = layer(z, logdet, True, features[f"fea_up{self.opt['scale'] >> level}"], std)
        return z, logdet


class StandInNCSR(StandIn):
    def forward(
        self, gt=None, lr=None, z=None, eps_std=None, reverse=False, epses=None, reverse_with_grad=False, lr_enc=None,
        add_gt_noise=False, step=None, y_label=None, std=None,
    ):  # fmt: skip
        return self.run(gt, lr, z, eps_std, reverse, epses, reverse_with_grad, lr_enc, add_gt_noise, std)
