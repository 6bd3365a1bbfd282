"""Methods that are measured: what they yield, and how it became 8 bits."""

from __future__ import annotations

import pytest
import torch
from support import image, randomize, tiny_model
from torch import Tensor

from ncsr_fast import RRDB
from ncsr_fast.evaluation import Bicubic, Flow, Generator, load_method
from ncsr_fast.flow.samples import NonFiniteSamples
from ncsr_fast.metrics import imresize, to_uint8

LR = to_uint8(image(3, 8, 10))


def drawn(method) -> Tensor:
    samples = list(method.samples(0, LR))
    assert len(samples) == method.n and all(sample.dtype == torch.uint8 for sample in samples)
    return torch.stack(samples)


@pytest.fixture
def generator() -> RRDB:
    torch.manual_seed(0)
    return randomize(RRDB(4, 8, 4, 2, training_noise="dense"))


def test_flow():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        floats = model.sample(LR[None] / 255, 3, 0.7, torch.Generator().manual_seed(5))[0]
    for rule in ("round", "truncate"):
        method = Flow(model, "model", 3, 0.7, 5, rule)
        assert torch.equal(drawn(method), to_uint8(floats, rule)) and method.to_8bit == rule
    assert not torch.equal(to_uint8(floats, "round"), to_uint8(floats, "truncate"))
    assert Flow(model, "model", 10, 0.0).n == 1
    assert Flow(model, "a", 3, 0.7, 5).description() == {"kind": "flow", "path": "a", "temperature": 0.7, "seed": 5}


def test_likelihood_of_a_flow():
    model = tiny_model(dtype=torch.float32)
    hr = to_uint8(image(3, 32, 40))
    assert Flow(model, "model").likelihood(hr, LR) == {}
    found = Flow(model, "model", likelihood=True).likelihood(hr, LR)
    with torch.no_grad():
        assert found["nll"] == pytest.approx(float(model.nll(hr[None] / 255, LR[None] / 255)))
    assert found["bits_per_dim"] == pytest.approx(found["nll"] / 3)


def test_samples_that_are_not_finite_are_refused():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.levels[0].actnorm_logs[1, 0] = -100.0
    with pytest.raises(NonFiniteSamples):
        drawn(Flow(model, "model", 2, 0.7))


def test_bicubic():
    assert torch.equal(drawn(Bicubic(4))[0], imresize(LR, 4))
    assert Bicubic(4).likelihood(LR, LR) == {}


def test_generator_without_noise(generator):
    generator.training_noise = "none"
    method = Generator(generator, "path", n=5, to_8bit="truncate")
    with torch.no_grad():
        floats = generator(LR[None] / 255)
    assert torch.equal(drawn(method), to_uint8(floats, "truncate")) and method.n == 1
    assert method.description()["noise"] == "none"


def test_generator_with_noise(generator):
    """ESRGAN+'s samples differ by the noise of its training, drawn from the seed."""
    first, again, other = (drawn(Generator(generator, "path", 3, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_generator_that_is_not_finite(generator):
    with torch.no_grad():
        generator.conv_last.bias[0] = float("nan")
    with pytest.raises(ValueError, match="image has NaN or infinite values"):
        drawn(Generator(generator, "path"))


def test_models_are_told_apart(generator, tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "flow")
    generator.save_pretrained(tmp_path / "generator")
    torch.save(generator.published_state_dict(), tmp_path / "generator.pth")
    flow, scale = load_method(tmp_path / "flow", n=3, temperature=0.5)
    assert isinstance(flow, Flow) and (flow.n, scale) == (3, 4)
    noisy, scale = load_method(tmp_path / "generator", 4, n=3)
    assert isinstance(noisy, Generator) and (noisy.n, noisy.noise, scale) == (3, "dense", 4)
    plain, _ = load_method(tmp_path / "generator.pth", n=3)
    assert (plain.n, plain.noise) == (1, "none")
    asked, _ = load_method(tmp_path / "generator.pth", n=3, noise="all")
    assert (asked.n, asked.noise) == (3, "all")
    assert isinstance(load_method("bicubic", 8)[0], Bicubic)


def test_scales_that_do_not_fit(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="is a model of scale 4, not 8"):
        load_method(tmp_path / "flow", 8)
    with pytest.raises(ValueError, match="bicubic enlargement needs a scale"):
        load_method("bicubic")
    with pytest.raises(ValueError, match="to_8bit must be one of 'round', 'truncate', not 'floor'"):
        load_method(tmp_path / "flow", to_8bit="floor")
