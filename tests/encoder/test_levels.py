"""The features that an RRDB encoder makes for the levels of a flow: SRFlow's, SRFlow-DA's, CTFlow's."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from support import image, randomize, vector_file

from ncsr_fast import RRDB
from ncsr_fast.layout import laid_out

X4, X8 = {"scale": 4, "long_skip": "last_block"}, {"scale": 8, "long_skip": "last_block"}
CT = {**X4, "in_channels": 1, "out_channels": 1, "level_scales": (0.5, 0.25, 0.125)}
ENCODERS = {
    "srflow_da_x4_small": {**X4, "level_scales": (2, 1)},
    "srflow_da_x8_small": {**X8, "level_scales": (4, 2, 1)},
    "srflow_da_s_x4_small": {**X4, "level_scales": (1, 1, 1)},
    "ctflow_small": CT,
}


def encoder(**changes) -> RRDB:
    torch.manual_seed(0)
    return randomize(RRDB(channels=12, growth=12, blocks=2, stacked_blocks=(0, 1), **changes)).double()


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_levels_are_those_of_srflow_unless_said(scale):
    sides = [scale // 2**level for level in range(1, 4) if scale >= 2**level]
    network = encoder(scale=scale)
    assert network.level_scales == (*sides, 0.5)
    features = network.features(image(2, 3, 4, 6))
    assert [tuple(u.shape) for u in features] == [(2, 36, int(4 * side), int(6 * side)) for side in (*sides, 0.5)]
    assert network.condition_channels == 36


@pytest.mark.parametrize("level_scales", [(4, 2, 1), (1, 1, 1), (0.5, 2, 0.25), (8, 1)])
def test_the_level_of_a_size_is_the_same_whatever_the_others_are(level_scales):
    lr, every = image(2, 3, 8, 4), (8, 4, 2, 1, 0.5, 0.25)
    whole = dict(zip(every, encoder(scale=8, level_scales=every).features(lr)))
    for side, u in zip(level_scales, encoder(scale=8, level_scales=level_scales).features(lr), strict=True):
        assert torch.equal(u, whole[side])


def test_levels_below_lr_are_bilinear_and_without_antialiasing():
    network = encoder(**CT)
    lr = image(2, 1, 24, 16)
    trunk = encoder(**{**CT, "level_scales": (1,)}).features(lr)[0]
    for side, u in zip(CT["level_scales"], network.features(lr)):
        own = F.interpolate(trunk[:, :12], scale_factor=side, mode="bilinear", align_corners=False)
        stacked = trunk[:, 12:, :: round(1 / side), :: round(1 / side)]
        assert torch.allclose(u, torch.cat([own, stacked], dim=1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ENCODERS)
def test_unused_modules_and_names(name):
    """Names of the published file, and what of them a flow's loss gives no gradient."""
    meta = json.loads(vector_file(f"family/{name}.json").read_text())
    options = meta["options"]["network_G"]
    blocks = options["flow"]["stackRRDB"]["blocks"]
    network = RRDB(channels=options["nf"], blocks=options["nb"], stacked_blocks=blocks, **ENCODERS[name])
    entries = {f"RRDB.{entry.name}": entry for entry in network.layout()}
    published = {key: tuple(shape) for key, shape in meta["shapes"].items() if key.startswith("RRDB.")}
    assert list(entries) == list(published)
    assert {key: entry.shape for key, entry in entries.items()} == published
    unused = {id(parameter) for module in network.head() for parameter in module.parameters()}
    names = {f"RRDB.{entry.name}" for entry, own in zip(network.layout(), network.parameters()) if id(own) in unused}
    assert names == set(published) - set(meta["grad_names"])


@pytest.mark.parametrize("level_scales", [(2, 1), (0.5, 0.25, 0.125), (1, 1, 1)])
def test_gradients_of_what_the_flow_uses(level_scales):
    network = encoder(**{**CT, "level_scales": level_scales})
    for module in network.head():
        module.requires_grad_(False)
    used = [parameter for parameter in network.parameters() if parameter.requires_grad]
    lr = image(1, 1, 8, 8)
    gradients = {}
    for name, u in {
        "reference": network.features(lr),
        "engine": [own.joined for own in network.condition(lr.contiguous(memory_format=torch.channels_last)).features],
    }.items():
        gradients[name] = torch.autograd.grad(sum(own.sin().sum() for own in u), used)
    for found, expected in zip(gradients["engine"], gradients["reference"]):
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_features_of_grey_images_lie_as_the_engine_wants_them():
    """An image of one channel is contiguous in both formats, and PyTorch's convolutions take the wrong one of the two."""
    lr = laid_out(image(2, 1, 16, 8), torch.channels_last)
    for own, stacked in encoder(**CT).condition(lr).features:
        assert own.is_contiguous(memory_format=torch.channels_last)
        assert stacked.is_contiguous(memory_format=torch.channels_last)


def test_levels_in_a_directory(tmp_path):
    network = encoder(**CT)
    again = RRDB.from_pretrained(network.save_pretrained(tmp_path / "net"))
    assert again.configuration() == network.configuration()
    assert again.level_scales == CT["level_scales"]


@pytest.mark.parametrize("level_scales", [(8, 1), (3,), (0.3,), (0,), (-1,)])
def test_levels_that_the_network_cannot_make(level_scales):
    with pytest.raises(ValueError, match=r"level_scales must be powers of two up to 4, from the HR side, not \("):
        encoder(scale=4, level_scales=level_scales)
