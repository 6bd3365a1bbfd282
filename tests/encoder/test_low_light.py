"""LLFlow's encoder against what the published program computed (tests/conformance/family), and against its definition."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import image, randomize, relative_error, vector_file, weights_module
from torch import Tensor

from ncsr_fast.encoder.low_light import LowLightEncoder, encoder_input
from ncsr_fast.ops.conv3x3 import ConvolutionMethod

NAMES = pytest.mark.parametrize("name", ["llflow_small", "llflow_smallnet_small"])
# the README of the vectors
VALUE = {torch.float64: 1e-6, torch.float32: 2e-5}
WAYS = {"reference": (None, torch.contiguous_format), "engine": (ConvolutionMethod(), torch.channels_last)}


@dataclass
class EncoderCase:
    """The encoder of one flow of the vectors."""

    meta: dict
    arrays: dict[str, np.ndarray]
    state: dict[str, Tensor]  # its published tensors, by their names in it

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.float64))

    def encoder(self, dtype: torch.dtype = torch.float64) -> LowLightEncoder:
        options = self.meta["options"]["network_G"]
        network = LowLightEncoder(options["nf"], 32, options["nb"], options["flow"]["stackRRDB"]["blocks"])
        for entry in network.layout():
            if entry.tensor is not None:
                entry.tensor.copy_(self.state[entry.name])
        return network.to(dtype)


@functools.cache
def case(name: str) -> EncoderCase:
    meta = json.loads(vector_file(f"family/{name}.json").read_text())
    filled = weights_module("family").fill(meta["shapes"], meta["seed"], meta["gains"])
    state = {key.removeprefix("RRDB."): torch.from_numpy(value) for key, value in filled.items() if key.startswith("RRDB.")}
    with np.load(vector_file(f"family/{name}.npz")) as arrays:
        return EncoderCase(meta, dict(arrays), state)


@pytest.mark.parametrize("dtype", VALUE, ids=["float64", "float32"])
@pytest.mark.parametrize("way", WAYS)
@NAMES
def test_published_features_and_prior(name, way, dtype):
    vectors, (method, layout) = case(name), WAYS[way]
    network, lr = vectors.encoder(dtype), vectors.tensor("eval_lr").to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        condition = network.condition(lr, method)
        color_map = network.color_map(lr, method)
    assert condition.prior_mean.dtype == dtype
    assert relative_error(encoder_input(lr)[:1], vectors.tensor("encoder_input")) < VALUE[dtype]
    assert relative_error(color_map, vectors.tensor("color_map")) < VALUE[dtype]
    assert relative_error(condition.prior_mean, vectors.tensor("prior_mean")) < VALUE[dtype]
    for features, key in zip(condition.features, ("feature_fea_up2", "feature_fea_up1", "feature_fea_up0"), strict=True):
        expected = vectors.tensor(key)
        u = features.joined[:1, :, : expected.shape[2], : expected.shape[3]]
        assert relative_error(u, expected) < VALUE[dtype]
        assert u.shape[1] == network.condition_channels


@NAMES
def test_published_names(name):
    """And which of the tensors no computation reads."""
    vectors = case(name)
    entries = {f"RRDB.{entry.name}": entry for entry in vectors.encoder().layout()}
    published = {key: tuple(shape) for key, shape in vectors.meta["shapes"].items() if key.startswith("RRDB.")}
    assert list(entries) == list(published)
    assert {key: entry.shape for key, entry in entries.items()} == published
    unused = {key for key, entry in entries.items() if entry.tensor is None}
    assert unused == set(published) - set(vectors.meta["grad_names"])


def small_encoder() -> LowLightEncoder:
    torch.manual_seed(0)
    return randomize(LowLightEncoder(channels=12, growth=12, blocks=2, stacked_blocks=(1, 0))).double()


def dark_image(height: int = 16, width: int = 24) -> Tensor:
    """Six channels, no two of whose slopes are equal, where the derivative of the larger one would not be defined."""
    low = image(2, 3, height, width, seed=4) / 4
    return torch.cat([(low + 1e-3).log(), image(2, 3, height, width, seed=5)], dim=1)


def defined_condition(network: LowLightEncoder, x: Tensor) -> list[Tensor]:
    """u of the three levels and the prior's mean, written once more from the description of LLFlow's program."""
    state = {entry.name: entry.tensor for entry in network.layout()}
    # a tensor of the state dict is detached from the parameter
    state |= {name: own for name, own in zip((name for name in state if state[name] is not None), network.parameters())}

    def conv(name: str, *features: Tensor) -> Tensor:
        return F.conv2d(torch.cat(features, 1), state[f"{name}.weight"], state[f"{name}.bias"], padding="same")

    def relu(features: Tensor) -> Tensor:
        return torch.where(features > 0, features, 0.2 * features)

    e = x[:, :3].exp()
    m = e / (e[:, :1] + e[:, 1:2] + e[:, 2:3] + 1e-4)
    below, above = torch.zeros_like(m), torch.zeros_like(m)
    below[:, :, :-1], above[:, :, 1:] = m[:, :, 1:], m[:, :, :-1]
    right, left = torch.zeros_like(m), torch.zeros_like(m)
    right[..., :-1], left[..., 1:] = m[..., 1:], m[..., :-1]
    down, across = ((below - above) / 2).abs(), ((right - left) / 2).abs()
    d = torch.where(down > across, down, across)
    f = conv("conv_second", relu(conv("conv_first", x, m, d)))
    f = f.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).amax(4)
    y, outputs = f, []
    for block in range(2):
        z = y
        for number in (1, 2, 3):
            inputs = [z]
            for index in (1, 2, 3, 4):
                inputs.append(relu(conv(f"RRDB_trunk.{block}.RDB{number}.conv{index}", *inputs)))
            z = z + 0.2 * conv(f"RRDB_trunk.{block}.RDB{number}.conv5", *inputs)
        y = y + 0.2 * z
        outputs.append(y)
    g = f + conv("trunk_conv", y)

    def halved(features: Tensor) -> Tensor:
        return features.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))

    h = relu(conv("downconv1", halved(g)))
    levels = [g, h, conv("downconv2", halved(h))]
    stacked = torch.cat([outputs[1], outputs[0]], 1)  # in the order of stacked_blocks
    u = [torch.cat([own, stacked[..., :: 2**level, :: 2**level]], 1) for level, own in enumerate(levels)]
    shares = 1 / (1 + (-conv("fine_tune_color_map.0", g)).exp())
    shares = shares.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    mean = torch.stack([shares[:, c, dy::8, dx::8] for c in range(3) for dy in range(8) for dx in range(8)], 1)
    return [*u, mean]


def test_values_and_gradients_by_definition():
    network = small_encoder()
    found, gradients = {}, {}
    for name in ("definition", *WAYS):
        x = dark_image()
        if name in WAYS:
            method, layout = WAYS[name]
            x = x.contiguous(memory_format=layout).requires_grad_()
            condition = network.condition(x, method)
            found[name] = [*(features.joined for features in condition.features), condition.prior_mean]
        else:
            found[name] = defined_condition(network, x.requires_grad_())
        loss = sum((value.sin() * (1 + index)).sum() for index, value in enumerate(found[name]))
        gradients[name] = torch.autograd.grad(loss, (x, *network.parameters()))
    for name in WAYS:
        for value, expected in zip(found[name] + [*gradients[name]], found["definition"] + [*gradients["definition"]]):
            assert (value - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_features_lie_as_the_engine_wants_them():
    for own, stacked in small_encoder().condition(dark_image().contiguous(memory_format=torch.channels_last)).features:
        assert own.is_contiguous(memory_format=torch.channels_last)
        assert stacked.is_contiguous(memory_format=torch.channels_last)


def test_the_mean_of_a_reference_image():
    """Channel c·64 + dy·8 + dx; black pixels have no colour."""
    hr = image(1, 3, 16, 8, seed=3)
    hr[..., 9, 2] = 0
    hr.requires_grad_()
    mean = LowLightEncoder.reference_prior_mean(hr)
    assert mean.shape == (1, 192, 2, 1)
    for channel, y, x in ((0, 0, 0), (1, 13, 6), (2, 9, 2)):
        pixel = hr[0, :, y, x]
        expected = pixel[channel] / (pixel.sum() + 1e-4)
        assert mean[0, channel * 64 + y % 8 * 8 + x % 8, y // 8, 0].item() == pytest.approx(expected.item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(mean.sin().sum(), hr)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_no_stacked_blocks():
    network = LowLightEncoder(channels=4, growth=2, blocks=1)
    lr = dark_image(8, 8).float()
    assert [features.joined.shape[1] for features in network.condition(lr).features] == [4, 4, 4]
    assert network.condition_channels == 4
    again = LowLightEncoder(**network.configuration())
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.condition(lr).prior_mean, network.condition(lr).prior_mean)
