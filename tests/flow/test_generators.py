"""RRDB generators against what the published programs computed (tests/conformance/family), and their files."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from operator_cases import marked
from support import image, randomize, relative_error, tiny_model, vector_file, weights_module
from torch import Tensor

from ncsr_fast import RRDB, CheckpointError
from ncsr_fast.encoder.blocks import ResidualNoise
from ncsr_fast.encoder.checkpoints import from_state
from ncsr_fast.encoder.names import encoder_layout, read_generator

NOISY = ["esrganplus_x4_small", "esrganplus_x4_block_noise_small"]
SMALL = ["esrgan_x4_small", "basicsr_x4_small", "basicsr_x2_small", "basicsr_x1_small", *NOISY]
FULL = ["esrgan_x4_full", "esrganplus_x4_full"]
LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
CASES = pytest.mark.parametrize(
    "name, layout", [*((name, layout) for name in SMALL for layout in LAYOUTS), *((name, "channels-last") for name in FULL)]
)
# the README of the vectors
VALUE = {torch.float64: 1e-6, torch.float32: 2e-5}
GRADIENT = 2e-6
DTYPES = pytest.mark.parametrize("dtype", VALUE, ids=["float64", "float32"])


@dataclass
class GeneratorCase:
    """One generator of the vectors."""

    meta: dict
    arrays: dict[str, np.ndarray]
    state: dict[str, Tensor]  # the published state dict

    def tensor(self, key: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.float64)).to(dtype)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(weights_module("family").normal(name, shape, self.meta["seed"]))

    def generator(self, dtype: torch.dtype = torch.float64, **asked) -> RRDB:
        """The generator in evaluation mode, from the state dict as its file holds it."""
        network = from_state(RRDB, read_generator(self.state), **asked) if asked else copy.deepcopy(self._network)
        return network.to(dtype).eval()

    @functools.cached_property
    def _network(self) -> RRDB:
        return from_state(RRDB, read_generator(self.state))

    def noisy_generator(self) -> RRDB:
        """The same in training mode, with the noise of the vectors."""
        network = self.generator().train()
        network.training_noise = "all" if self.meta["options"]["noise_after_blocks"] else "dense"
        for name, module in network.named_modules():
            if isinstance(module, ResidualNoise):
                place = name.removesuffix(".noise").replace("body", "model.1.sub").replace("rdb", "RDB")
                module.draw = lambda y, place=place: self.normal(f"noise:{place}", tuple(y.shape))
        return network


@functools.cache
def case(name: str) -> GeneratorCase:
    meta = json.loads(vector_file(f"family/{name}.json").read_text())
    state = weights_module("family").fill(meta["shapes"], meta["seed"], meta["gains"])
    with np.load(vector_file(f"family/{name}.npz")) as arrays:
        return GeneratorCase(meta, dict(arrays), {name: torch.from_numpy(value) for name, value in state.items()})


# full depth in float64, with noise or ESRGAN's, and the small networks fail for what these would
@marked("exhaustive", lambda name, dtype: name == "esrganplus_x4_full" and dtype == torch.float32)
@marked("slow", lambda name, layout, dtype: name in FULL or layout != "nchw" or dtype != torch.float64)
@DTYPES
@CASES
def test_images(name, dtype, layout):
    """In evaluation mode; noise is never in effect there."""
    vectors = case(name)
    network, inside = vectors.generator(dtype), []
    network.training_noise = "all"
    network.body[-1].register_forward_hook(lambda _, __, output: inside.append(output))
    with torch.no_grad():
        sr = network(vectors.tensor("lr", dtype).contiguous(memory_format=LAYOUTS[layout]))
    assert sr.dtype == dtype
    assert relative_error(sr, vectors.tensor("sr")) < VALUE[dtype]
    assert relative_error(inside[0][:1], vectors.tensor("inside_last_block")) < VALUE[dtype]


@marked("exhaustive", lambda name: name == "esrganplus_x4_full")  # whose gradients with noise are below
@marked("slow", lambda name, layout: name not in ("esrgan_x4_small", "basicsr_x2_small") or layout != "nchw")
@CASES
def test_gradients(name, layout):
    vectors = case(name)
    check_gradients(vectors, vectors.generator(), "", layout)


@marked("slow", lambda name: name in FULL)
@pytest.mark.parametrize("name", [*NOISY, "esrganplus_x4_full"])
def test_images_and_gradients_with_noise(name):
    vectors = case(name)
    check_gradients(vectors, vectors.noisy_generator(), "noise_")


def check_gradients(vectors: GeneratorCase, network: RRDB, prefix: str, layout: str = "nchw") -> None:
    """Of mean |sr - target|, with respect to the image and every parameter."""
    lr = vectors.tensor("lr").contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    sr = network(lr)
    loss = (sr - vectors.tensor("target")).abs().mean()
    loss.backward()
    assert relative_error(sr.detach(), vectors.tensor(f"{prefix}sr")) < VALUE[torch.float64]
    assert relative_error(loss.detach(), vectors.tensor(f"{prefix}loss")) < VALUE[torch.float64]
    assert relative_error(lr.grad, vectors.tensor(f"{prefix}grad_lr")) < GRADIENT
    published = read_generator(vectors.state).names
    parameters = {published[name]: own for (name, *_), own in zip(encoder_layout(network), network.parameters(), strict=True)}
    names = vectors.meta["grad_names"]
    assert sorted(parameters) == sorted(names)
    probes = [vectors.normal(f"probe:{name}", tuple(parameters[name].shape)) for name in names]
    found = [parameters[name].grad for name in names]
    norm, dot = vectors.tensor(f"{prefix}grad_norm"), vectors.tensor(f"{prefix}grad_dot")
    assert ((torch.stack([grad.norm() for grad in found]) - norm).abs() <= GRADIENT * norm).all()
    # a dot product or a sum cancels: it is measured against what it could have been
    largest = norm * torch.stack([probe.norm().sqrt().clamp(min=1) for probe in probes])
    assert ((torch.stack([(grad * probe).sum() for grad, probe in zip(found, probes)]) - dot).abs() <= GRADIENT * largest).all()
    largest = norm * torch.tensor([grad.numel() for grad in found]).sqrt()
    sums = torch.stack([grad.sum() for grad in found])
    assert ((sums - vectors.tensor(f"{prefix}grad_sum")).abs() <= GRADIENT * largest).all()


@pytest.mark.parametrize("name", ["esrgan_x4_small", pytest.param("esrgan_x4_full", marks=pytest.mark.slow)])
def test_the_same_weights_as_the_encoder_of_srflow(name):
    """Its long skip starts elsewhere, and the picture is another."""
    vectors = case(name)
    with torch.no_grad():
        sr = vectors.generator(long_skip="last_block")(vectors.tensor("lr"))
    assert relative_error(sr, vectors.tensor("sr_of_srflow_encoder")) < VALUE[torch.float64]
    assert relative_error(sr, vectors.tensor("sr")) > 0.5


@pytest.mark.parametrize("name", sorted({*SMALL} - {"basicsr_x4_small"}))  # whose network ESRGAN has too
def test_published_names_and_back(name):
    """The names, in order, are those that the network's own program reads."""
    vectors = case(name)
    again = vectors.generator().published_state_dict()
    assert list(again) == list(vectors.state)
    assert all(torch.equal(again[name], tensor) for name, tensor in vectors.state.items())


def test_sizes_that_the_unshuffle_cannot_take():
    network = RRDB(2, channels=4, growth=2, blocks=1, unshuffle=2)
    assert network(image(1, 3, 4, 6, dtype=torch.float32)).shape == (1, 3, 8, 12)
    with pytest.raises(ValueError, match="the sides of lr must be multiples of 2 for this generator, .* not 4×5; pad or crop"):
        network(image(1, 3, 4, 5, dtype=torch.float32))


def test_images_of_other_channels_are_named():
    with pytest.raises(ValueError, match=r"lr must have shape \(B, 1, H, W\), not \(1, 3, 4, 4\)"):
        RRDB(4, channels=4, growth=2, blocks=1, in_channels=1)(image(1, 3, 4, 4, dtype=torch.float32))


def test_arguments_that_are_none_of_the_choices():
    with pytest.raises(ValueError, match="long_skip must be one of 'conv_first', 'last_block', not 'first'"):
        RRDB(4, channels=4, growth=2, blocks=1, long_skip="first")
    with pytest.raises(ValueError, match="training_noise must be one of 'none', 'dense', 'all', not True"):
        RRDB(4, channels=4, growth=2, blocks=1, training_noise=True)
    with pytest.raises(ValueError, match="unshuffle must be a power of two, not 3"):
        RRDB(4, channels=4, growth=2, blocks=1, unshuffle=3)


SHAPES = {
    "×4": {"scale": 4},
    "×2-of-old-esrgan": {"scale": 2},
    "×1-without-doublings": {"scale": 1},
    "×8": {"scale": 8},
    "×2-unshuffled": {"scale": 2, "unshuffle": 2},
    "×1-unshuffled": {"scale": 1, "unshuffle": 4},
    "×1-unshuffled-by-2": {"scale": 1, "unshuffle": 2},
    "×2-unshuffled-by-4": {"scale": 2, "unshuffle": 4},
    "×4-unshuffled": {"scale": 4, "unshuffle": 2},
    "×1-unshuffled-by-8": {"scale": 1, "unshuffle": 8},
    "grey": {"scale": 4, "in_channels": 1, "out_channels": 1},
    "grey-×2-unshuffled": {"scale": 2, "unshuffle": 2, "in_channels": 1, "out_channels": 1},
    "grey-to-colour": {"scale": 4, "in_channels": 1},
    "esrgan+": {"scale": 4, "dense_residual": True, "training_noise": "dense"},
    "esrgan+-×2": {"scale": 2, "dense_residual": True, "training_noise": "dense"},
}


@marked("slow", lambda kind: kind == "directory")
@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_read_again(tmp_path, shape, kind):
    source = randomize(RRDB(channels=4, growth=2, blocks=2, **shape)).eval()
    if kind == "file":
        torch.save({"params_ema": source.published_state_dict()}, tmp_path / "net.pth")
        again = RRDB.from_pretrained(tmp_path / "net.pth").eval()
    else:
        again = RRDB.from_pretrained(source.save_pretrained(tmp_path / "net")).eval()
    lr = image(2, source.in_channels, 8, 16, dtype=torch.float32)
    assert again.configuration() == source.configuration()
    assert torch.equal(again(lr), source(lr)) and source(lr).shape[2] == 8 * source.scale


def test_a_generator_that_reads_four_times_its_channels_without_an_unshuffle(tmp_path):
    source = RRDB(4, channels=4, growth=2, blocks=1, in_channels=12)
    torch.save(source.published_state_dict(), tmp_path / "net.pth")
    assert RRDB.from_pretrained(tmp_path / "net.pth").unshuffle == 2
    assert RRDB.from_pretrained(tmp_path / "net.pth", unshuffle=1).configuration() == source.configuration()


@pytest.mark.parametrize("channels, unshuffle", [(12, 8), (9, 3), (64, 8)])
def test_an_unshuffle_that_the_network_cannot_have(tmp_path, channels, unshuffle):
    """By its channels, not a power of two, by its doublings."""
    torch.save(RRDB(4, 4, 2, 1, in_channels=channels).published_state_dict(), tmp_path / "net.pth")
    refusal = f"unshuffle={unshuffle}: the file's network reads {channels} channels and upsamples ×2 2 times"
    with pytest.raises(ValueError, match=refusal):
        RRDB.from_pretrained(tmp_path / "net.pth", unshuffle=unshuffle)


def test_an_image_that_the_network_would_read_behind_another_unshuffle(tmp_path):
    """No published file says what its channels are; the messages say what was made of them."""
    for shape, images, right, said in (
        ({"scale": 4, "in_channels": 12}, 12, 1, "×2, .*, pixel unshuffle 2"),
        ({"scale": 1, "unshuffle": 2, "out_channels": 1}, 3, 2, "×2 of 12-channel images, "),
    ):
        source = RRDB(channels=4, growth=2, blocks=1, **shape)
        torch.save(source.published_state_dict(), tmp_path / "net.pth")
        read, lr = RRDB.from_pretrained(tmp_path / "net.pth"), image(1, images, 4, 4, dtype=torch.float32)
        assert re.search(said, read.describe())
        with pytest.raises(ValueError, match=rf"lr must have shape .* its 12 channels are made, .*\(file, unshuffle={right}\)"):
            read(lr)
        assert torch.equal(RRDB.from_pretrained(tmp_path / "net.pth", unshuffle=right)(lr), source(lr))
    with pytest.raises(ValueError, match=r"not \(1, 5, 4, 4\)$"):
        read(image(1, 5, 4, 4, dtype=torch.float32))


def test_where_the_long_skip_of_a_file_starts(tmp_path):
    """As asked, ESRGAN's way otherwise; the encoder of a flow is known."""
    model = randomize(tiny_model(dtype=torch.float32), amount=0.3)
    torch.save(model.published_state_dict(), tmp_path / "flow.pth")
    torch.save(model.encoder.published_state_dict(), tmp_path / "rrdb.pth")
    lr = image(1, 3, 4, 6, dtype=torch.float32)
    with torch.no_grad():
        expected = model.encoder(lr)
        assert torch.equal(RRDB.from_pretrained(tmp_path / "flow.pth")(lr), expected)
        assert torch.equal(RRDB.from_pretrained(tmp_path / "flow.pth", long_skip="last_block")(lr), expected)
        assert torch.equal(RRDB.from_pretrained(tmp_path / "rrdb.pth", long_skip="last_block")(lr), expected)
        assert relative_error(RRDB.from_pretrained(tmp_path / "rrdb.pth")(lr), expected) > 0.05
    with pytest.raises(ValueError, match="long_skip='conv_first': the file is a flow's, and its encoder has 'last_block'"):
        RRDB.from_pretrained(tmp_path / "flow.pth", long_skip="conv_first")


def test_where_the_long_skip_of_a_directory_starts(tmp_path):
    """As its config.json has it; as in SRFlow where an earlier version wrote none."""
    generator = RRDB(4, channels=4, growth=2, blocks=1)
    folder = generator.save_pretrained(tmp_path / "net")
    assert (
        RRDB.from_pretrained(folder).long_skip == RRDB.from_pretrained(folder, long_skip="conv_first").long_skip == "conv_first"
    )
    with pytest.raises(ValueError, match="long_skip='last_block': .*net' holds a network with long_skip='conv_first'"):
        RRDB.from_pretrained(folder, long_skip="last_block")
    with pytest.raises(ValueError, match="unshuffle=2: .*net' holds a network with unshuffle=1"):
        RRDB.from_pretrained(folder, unshuffle=2)
    written = json.loads((folder / "config.json").read_text())
    before = {key: written[key] for key in ("model_type", "scale", "channels", "growth", "blocks", "stacked_blocks")}
    (folder / "config.json").write_text(json.dumps(before))
    assert RRDB.from_pretrained(folder).long_skip == "last_block"
    assert RRDB.from_pretrained(folder, long_skip="conv_first").configuration() == generator.configuration()


def test_loading_the_encoder_of_a_flow_into_a_generator():
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(CheckpointError, match="whose encoder has its long skip from the last block"):
        RRDB(4, channels=4, growth=2, blocks=2).load_published(model.published_state_dict())
    generator = randomize(RRDB(4, channels=4, growth=2, blocks=2))
    model.encoder.load_published(generator.published_state_dict())  # weights to start from: the skip stays the flow's
    assert model.encoder.long_skip == "last_block"
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), model.encoder.parameters(), strict=True))


def test_esrgan_plus_is_no_encoder_of_a_flow():
    source = RRDB(4, channels=4, growth=2, blocks=2, dense_residual=True)
    with pytest.raises(CheckpointError, match="6 unexpected: RRDB_trunk.0.RDB1.conv1x1.weight"):
        tiny_model(dtype=torch.float32).encoder.load_published(source.published_state_dict())


def test_the_long_skip_of_features():
    """`features` and `forward` read the same trunk."""
    lr, trunks = image(1, 3, 4, 4, dtype=torch.float32), {}
    for long_skip in ("conv_first", "last_block"):
        torch.manual_seed(0)
        network = RRDB(4, channels=4, growth=2, blocks=1, long_skip=long_skip)
        trunks[long_skip] = network.features(lr)[1]
        first = network.conv_first(lr)
        last = network.body[0](first)
        skip = first if long_skip == "conv_first" else last
        assert torch.allclose(trunks[long_skip], skip + network.conv_body(last), atol=1e-6)
    assert not torch.allclose(*trunks.values())


def test_noise_of_the_global_generator():
    network = randomize(RRDB(4, channels=4, growth=2, blocks=1, training_noise="dense"))
    lr = image(1, 3, 4, 4, dtype=torch.float32)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return network(lr)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    network.training_noise = "none"
    assert torch.equal(drawn(0), drawn(1)) and torch.equal(drawn(0), network.eval()(lr))
