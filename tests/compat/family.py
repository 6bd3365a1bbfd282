"""Networks with the module tree, parameter names and calls of SRFlow-DA, CTFlow and LLFlow, in plain PyTorch.

Written from the conformance README of the family and the names and shapes in its vectors. As `compat.standin`, of which they
share the layers, they decode in float64 too.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from compat.standin import ActNorm2d, Block, Encoder, InvertibleConv1x1, Split, ZeroConv, small_network
from torch import nn

HIDDEN_LAYERS = {"SRFlow-DA": 4, "SRFlow-DA-S": 4, "SRFlow-DA-R": 4, "SRFlow-DA-D": 36}


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class DeepNetwork:
    """SRFlow-DA's network, whose parts have names of their own in a coupling."""

    def __init__(self, kind: str, inputs: int, hidden: int, outputs: int) -> None:
        self.kind = kind
        first, last = convolution(inputs, hidden), ZeroConv(hidden, outputs)
        layers = [convolution(hidden, hidden) for _ in range(HIDDEN_LAYERS[kind])]
        if kind in ("SRFlow-DA", "SRFlow-DA-S"):
            between = [part for layer in (first, *layers) for part in (layer, nn.ReLU())]
            self.parts = {"": nn.Sequential(*between, last)}
            return
        if kind == "SRFlow-DA-R":
            middle = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])
        else:
            pairs = zip(layers[::2], layers[1::2])
            middle = nn.ModuleList(nn.Sequential(one, nn.ReLU(), other, nn.ReLU()) for one, other in pairs)
        self.parts = {"1": nn.Sequential(first, nn.ReLU()), "2": middle, "3": nn.Sequential(last)}


def evaluated(coupling: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """The output of a coupling's network of this name."""
    if hasattr(coupling, name):
        return getattr(coupling, name)(x)
    first, middle, last = (getattr(coupling, f"{name}{part}") for part in "123")
    h = first(x)
    if isinstance(middle, nn.Sequential):
        return last(h + middle(h))
    for pair in middle:
        h = h + pair(h)
    return last(h)


class Coupling(nn.Module):
    def __init__(self, kind: str | None, channels: int, condition: int, hidden: int) -> None:
        super().__init__()
        self.kept, self.affine_eps = channels // 2, 1e-4
        if kind in HIDDEN_LAYERS:
            self.model_name = kind
        sizes = {"fAffine": (self.kept + condition, 2 * (channels - self.kept)), "fFeatures": (condition, 2 * channels)}
        for name, (inputs, outputs) in sizes.items():
            if kind not in HIDDEN_LAYERS:
                setattr(self, name, small_network(inputs, hidden, outputs))
                continue
            for part, module in DeepNetwork(kind, inputs, hidden, outputs).parts.items():
                setattr(self, f"{name}{part}", module)

    def forward(self, z, logdet, reverse, u):
        for name, kept in [("fAffine", self.kept), ("fFeatures", 0)] if reverse else [("fFeatures", 0), ("fAffine", self.kept)]:
            h = evaluated(self, name, torch.cat([z[:, :kept], u], dim=1))
            shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2) + self.affine_eps
            z2 = z[:, kept:] / scale - shift if reverse else (z[:, kept:] + shift) * scale
            z, change = torch.cat([z[:, :kept], z2], dim=1), scale.log().sum(dim=(1, 2, 3))
            logdet = logdet - change if reverse else logdet + change
        return z, logdet


class Step(nn.Module):
    def __init__(self, channels: int, coupling: Coupling | None) -> None:
        super().__init__()
        self.actnorm, self.invconv = ActNorm2d(channels), InvertibleConv1x1(channels)
        if coupling is not None:
            self.affine = coupling

    def forward(self, z, logdet, reverse, u):
        parts = [self.actnorm, self.invconv, *([lambda *given: self.affine(*given, u)] if hasattr(self, "affine") else [])]
        for part in parts[::-1] if reverse else parts:
            z, logdet = part(z, logdet, reverse)
        return z, logdet


class Squeeze(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor


class Flow(nn.Module):
    """`flowUpsamplerNet`, whose levels are given as (squeeze, steps, True where a split ends it)."""

    def __init__(
        self, options: dict, levels: list[tuple[int, int, bool]], names: dict[int, str], unused: tuple[int, int]
    ) -> None:
        super().__init__()
        network = options["network_G"]
        condition = network["nf"] * (1 + len(network["flow"]["stackRRDB"]["blocks"]))
        hidden = network["flow"]["CondAffineSeparatedAndCond"]["hidden_channels"]
        self.levelToName, self.layers, self.depth_of = names, nn.ModuleList(), []
        channels, depth = network["in_nc"], 0
        for factor, count, is_split in levels:
            layers: list[nn.Module] = []
            if factor > 1:
                channels, depth = channels * factor**2, depth + factor.bit_length() - 1
                layers += [Squeeze(factor), *(Step(channels, None) for _ in range(network["flow"]["additionalFlowNoAffine"]))]
            layers += [Step(channels, Coupling(options["model"], channels, condition, hidden)) for _ in range(count)]
            if is_split:
                layers.append(Split(channels))
                channels -= channels // 2
            self.layers.extend(layers)
            self.depth_of += [depth] * len(layers)
        self.f = nn.Sequential(convolution(*unused))

    def forward(
        self, gt=None, rrdbResults=None, z=None, epses=None, logdet=0.0, reverse=False, eps_std=None, y_onehot=None
    ):  # fmt: skip
        given = list(epses) if reverse and isinstance(epses, list) else None
        state = (z if given is None else given.pop()) if reverse else gt
        latents = []
        layers = list(zip(self.layers, self.depth_of))
        for layer, depth in layers[::-1] if reverse else layers:
            if isinstance(layer, Squeeze):
                state = (F.pixel_shuffle if reverse else F.pixel_unshuffle)(state, layer.factor)
            elif isinstance(layer, Split) and reverse:
                shape = (len(state), layer.conv.bias.shape[0] // 2, *state.shape[2:])
                eps = torch.normal(torch.zeros(shape), eps_std * torch.ones(shape)) if given is None else given.pop()
                z2, _, density = layer.density(state, None, eps)
                state, logdet = torch.cat([state, z2], dim=1), logdet - density
            elif isinstance(layer, Split):
                state, z2 = state[:, : layer.kept], state[:, layer.kept :]
                _, eps, density = layer.density(state, z2)
                latents.append(eps)
                logdet = logdet + density
            else:
                state, logdet = layer(state, logdet, reverse, rrdbResults[self.levelToName[depth]])
        if not reverse and isinstance(epses, list):
            epses.extend([*latents, state])
            return epses, logdet
        return state, logdet


class ScanEncoder(Encoder):
    """CTFlow's: nothing is upsampled, and the features are every second, fourth and eighth pair of the trunk's output."""

    def forward(self, x, stacked):
        fea, outputs = self.conv_first(x), []
        for block in self.RRDB_trunk:
            fea = block(fea)
            outputs.append(fea)
        fea = fea + self.trunk_conv(fea)
        joined = torch.cat([outputs[index] for index in stacked], dim=1)
        found = {}
        for name, factor in (("fea_up0", 2), ("fea_up-1", 4), ("fea_up-2", 8)):
            own = F.interpolate(fea, scale_factor=1 / factor, mode="bilinear", align_corners=False, recompute_scale_factor=True)
            found[name] = torch.cat([own, F.interpolate(joined, size=own.shape[2:])], dim=1)
        return found


class LowLightEncoder(nn.Module):
    """LLFlow's `ConEncoder1`."""

    def __init__(self, channels: int, growth: int, blocks: int) -> None:
        super().__init__()
        self.conv_first, self.conv_second = convolution(12, channels), convolution(channels, channels)
        self.RRDB_trunk = nn.Sequential(*(Block(channels, growth) for _ in range(blocks)))
        for name in ("trunk_conv", "downconv1", "downconv2", "downconv3", "HRconv"):
            setattr(self, name, convolution(channels, channels))
        self.conv_last, self.awb_para = convolution(channels, 3), nn.Linear(channels, 3)
        self.lrelu = nn.LeakyReLU(0.2)
        self.fine_tune_color_map = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.Sigmoid())

    def forward(self, x, stacked):
        e = x[:, :3].exp()
        m = e / (e.sum(dim=1, keepdim=True) + 1e-4)
        edges = []
        for dim in (2, 3):
            zeros = torch.zeros_like(m.narrow(dim, 0, 1))
            padded, size = torch.cat([zeros, m, zeros], dim=dim), m.shape[dim]
            edges.append(((padded.narrow(dim, 2, size) - padded.narrow(dim, 0, size)) / 2).abs())
        fea = self.conv_second(self.lrelu(self.conv_first(torch.cat([x, m, torch.maximum(*edges)], dim=1))))
        head = fea = F.max_pool2d(fea, 2)
        outputs = []
        for block in self.RRDB_trunk:
            fea = block(fea)
            outputs.append(fea)
        half = head + self.trunk_conv(fea)
        quarter = self.lrelu(self.downconv1(F.avg_pool2d(half, 2)))
        joined = torch.cat([outputs[index] for index in stacked], dim=1)
        own = {"fea_up2": half, "fea_up1": quarter, "fea_up0": self.downconv2(F.avg_pool2d(quarter, 2))}
        found = {name: torch.cat([each, F.interpolate(joined, size=each.shape[2:])], dim=1) for name, each in own.items()}
        return found | {"color_map": self.fine_tune_color_map(F.interpolate(half, scale_factor=2))}


class Network(nn.Module):
    """What the programs' networks have in common."""

    def __init__(self, options: dict) -> None:
        super().__init__()
        self.opt, self.quant, self.calls = options, options["datasets"]["train"]["quant"], 0

    def rrdbPreprocessing(self, lr):
        return self.RRDB(lr, self.opt["network_G"]["flow"]["stackRRDB"]["blocks"])

    def noisy(self, gt):
        """The HR images with noise, and its term of the log-det."""
        pixels = gt.shape[2] * gt.shape[3]
        return gt + ((torch.rand(gt.shape) - 0.5) / self.quant).to(gt), -math.log(self.quant) * pixels

    def prior_mean(self, gt, features):
        return 0.0

    def encode(self, gt, lr, epses, lr_enc, add_gt_noise):
        features = self.rrdbPreprocessing(lr) if lr_enc is None else lr_enc
        noisy, term = self.noisy(gt) if add_gt_noise else (gt, 0.0)
        found, logdet = self.flowUpsamplerNet(gt=noisy, rrdbResults=features, logdet=gt.new_zeros(len(gt)) + term, epses=epses)
        top = (found[-1] if isinstance(found, list) else found) - self.prior_mean(gt, features)
        density = (-0.5 * top.square() - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2, 3))
        return found, -(logdet + density) / (math.log(2) * gt.shape[2] * gt.shape[3]), logdet

    def decode(self, lr, z, eps_std, epses, lr_enc, add_gt_noise, recorded):
        with torch.set_grad_enabled(torch.is_grad_enabled() and recorded):
            features = self.rrdbPreprocessing(lr) if lr_enc is None else lr_enc
            pixels = lr.shape[2] * lr.shape[3] * self.opt["scale"] ** 2
            logdet = lr.new_zeros(len(lr)) + (math.log(self.quant) * pixels if add_gt_noise else 0.0)
            return self.flowUpsamplerNet(
                rrdbResults=features, z=self.top(z, features), eps_std=eps_std, epses=epses, logdet=logdet, reverse=True
            )

    def top(self, z, features):
        return z


class SRFlowNet(Network):
    """SRFlow-DA and CTFlow."""

    def __init__(self, options: dict) -> None:
        super().__init__(options)
        network, kind, scale = options["network_G"], options["model"], options["scale"]
        steps, blocks = network["flow"]["K"], network["nb"]
        if scale == 1:
            levels = [(2, steps, index < 2) for index in range(3)]
            names = {1: "fea_up0", 2: "fea_up-1", 3: "fea_up-2"}
            self.RRDB = ScanEncoder(network["nf"], network["gc"], blocks, 4)
            self.RRDB.conv_first, self.RRDB.conv_last = convolution(1, network["nf"]), convolution(network["nf"], 1)
        else:
            doublings = scale.bit_length() - 1
            levels = [(2, steps, index < doublings - 1) for index in range(doublings)]
            if kind == "SRFlow-DA-S":
                ends = [*range(1, steps, 6), steps]
                levels = [(1 if i else scale, end - start, end < steps) for i, (start, end) in enumerate(zip([0, *ends], ends))]
            names = {doubling: f"fea_up{scale >> doubling}" for doubling in range(1, doublings + 1)}
            self.RRDB = Encoder(network["nf"], network["gc"], blocks, scale)
        condition = network["nf"] * (1 + len(network["flow"]["stackRRDB"]["blocks"]))
        self.flowUpsamplerNet = Flow(options, levels, names, (condition, 96))

    def noisy(self, gt):
        if self.opt["scale"] == 1:
            return super().noisy(gt)
        return gt + (torch.randn(gt.shape) * (4 / math.sqrt(3) / 255)).to(gt), 0.0

    def forward(
        self, gt=None, lr=None, z=None, eps_std=None, reverse=False, epses=None, reverse_with_grad=False, lr_enc=None,
        add_gt_noise=False, step=None, y_label=None,
    ):  # fmt: skip
        self.calls += 1
        if reverse:
            return self.decode(lr, z, eps_std, epses, lr_enc, add_gt_noise, reverse_with_grad)
        return self.encode(gt, lr, epses, lr_enc, add_gt_noise)


class LLFlow(Network):
    def __init__(self, options: dict) -> None:
        super().__init__(options)
        network = options["network_G"]
        self.RRDB = LowLightEncoder(network["nf"], network["gc"], network["nb"])
        names = {1: "fea_up2", 2: "fea_up1", 3: "fea_up0"}
        unused = 64 * (1 + len(network["flow"]["stackRRDB"]["blocks"])), 384
        self.flowUpsamplerNet = Flow(options, [(2, network["flow"]["K"], False)] * 3, names, unused)
        self.max_pool = nn.MaxPool2d(3)

    def prior_mean(self, gt, features):
        shares = features["color_map"]
        if random.random() <= self.opt["train_gt_ratio"]:
            shares = gt / (gt.sum(dim=1, keepdim=True) + 1e-4)
        return F.pixel_unshuffle(shares, 8)

    def top(self, z, features):
        return F.pixel_unshuffle(features["color_map"], 8)

    @torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
    def forward(
        self, gt=None, lr=None, z=None, eps_std=None, reverse=False, epses=None, reverse_with_grad=False, lr_enc=None,
        add_gt_noise=False, step=None, y_label=None, align_condition_feature=False, get_color_map=False,
    ):  # fmt: skip
        self.calls += 1
        if align_condition_feature or get_color_map:
            raise NotImplementedError
        if reverse:
            return self.decode(lr, z, eps_std, epses, lr_enc, add_gt_noise, reverse_with_grad)
        return self.encode(gt, lr, epses, lr_enc, add_gt_noise)


class HalfLLFlow(LLFlow):
    """LLFlow under an autocast that is on, as on a GPU."""

    forward = torch.autocast("cpu", dtype=torch.bfloat16)(LLFlow.forward.__wrapped__)
