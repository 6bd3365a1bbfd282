"""The decoder as torch.export and ONNX have it, against the model, at other sizes and batches than it was traced with."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support import exports, image, randomize, relative_error, tiny_config, tiny_model

from ncsr_fast import NCSR, NCSRConfig, export
from ncsr_fast.export import Decoder, export_onnx, export_program

SIZES = [(1, 4, 4), (3, 10, 4), (1, 4, 12), (2, 6, 8)]  # the last is the example's
TOLERANCE = 1e-4  # what the issue asks for; float32 is 100 times closer

MODELS = {
    "ncsr-x4": lambda: tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2)),
    "ncsr-std-x4": lambda: tiny_model(dtype=torch.float32, noise_channels=1),
    "ncsr-x8": lambda: tiny_model(dtype=torch.float32, scale=8, noise_steps=(0, 0, 1, 1)),
    "srflow-x4": lambda: tiny_model(dtype=torch.float32, noise_channels=0, noise_steps=()),
    "compact": lambda: NCSR.from_pretrained("ncsr-compact-x4"),
}


def inputs(model: NCSR, batch: int, height: int, width: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A smooth image, and latents of temperature 0.3."""
    like = model.levels[0].actnorm_bias
    corners = image(batch, 3, 2, 2, seed=height)
    lr = torch.nn.functional.interpolate(corners, size=(height, width), mode="bilinear").to(like)
    generator = torch.Generator().manual_seed(width)
    shapes = model.latent_shapes(height, width)
    return lr, [(0.3 * torch.randn(batch, *shape, generator=generator)).to(like) for shape in shapes]


@torch.no_grad()
def decoded(model: NCSR, lr: torch.Tensor, latents: list[torch.Tensor] | None) -> torch.Tensor:
    latents = latents or [torch.zeros(len(lr), *shape).to(lr) for shape in model.latent_shapes(*lr.shape[2:])]
    return model.decode(latents, lr)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["latents", "deterministic"])
def test_the_decoder_is_the_model(name, deterministic):
    model = MODELS[name]().double()
    decoder = Decoder(model, deterministic, clip=False)
    lr, latents = inputs(model, 2, 6, 4)
    latents = [] if deterministic else latents
    assert relative_error(decoder(lr, *latents), decoded(model, lr, latents)) < 1e-11  # the order of float64 sums
    clipped = Decoder(model, deterministic)(lr, *latents)
    assert torch.equal(clipped, decoder(lr, *latents).clamp(0, 1)) and not clipped.requires_grad


def test_the_decoder_has_weights_of_its_own():
    model = tiny_model()
    decoder = Decoder(model)
    lr, latents = inputs(model, 1, 4, 4)
    before = decoder(lr, *latents)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert torch.equal(decoder(lr, *latents), before)


def test_a_pixel_that_overflowed_is_nan():
    model = tiny_model(dtype=torch.float32)
    decoder = Decoder(model)
    decoder.levels[0].forward = lambda z, latent, u: torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0, -1.0, 0.5])
    lr, latents = inputs(model, 1, 4, 4)
    assert decoder(lr, *latents).nan_to_num(7).tolist() == [7, 7, 7, 1, 0, 0.5]


@exports
@pytest.mark.parametrize("name", ["ncsr-x4", "ncsr-x8"])
def test_torch_export_of_the_decoder(name):
    model = MODELS[name]()
    program = export_program(Decoder(model, clip=False)).module()
    for size in SIZES:
        lr, latents = inputs(model, *size)
        assert relative_error(program(lr, *latents), decoded(model, lr, latents)) < 1e-5  # float32


class Decoding(torch.nn.Module):
    """A model's `decode`, as torch.export wants it."""

    def __init__(self, model: NCSR) -> None:
        super().__init__()
        self.model = model

    def forward(self, lr, latents):
        return self.model.decode(latents, lr)


@exports
@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_torch_export_of_the_model_itself(engine):
    """Its operators stay what they are in the graph."""
    model = tiny_model(dtype=torch.float32)
    model.engine = engine
    shapes = Decoder(model).dynamic_shapes()
    lr, latents = inputs(model, 2, 6, 8)
    shapes = {"lr": shapes["lr"], "latents": list(shapes["latents"])}
    with torch.no_grad():
        program = torch.export.export(Decoding(model), (lr, latents), dynamic_shapes=shapes).module()
        for size in SIZES:
            lr, latents = inputs(model, *size)
            assert relative_error(program(lr, latents), decoded(model, lr, latents)) < 1e-5  # float32


# with latents and a noise condition; and without either, clipped: PyTorch's exporter takes half a minute each time
ONNX = [("ncsr-x4", False, False), ("srflow-x4", True, True)]
MORE_ONNX = [("ncsr-x8", False, False), ("compact", False, True), ("compact", True, True)]


@pytest.mark.slow
@exports
@pytest.mark.parametrize(
    "name, deterministic, clip", [*ONNX, *(pytest.param(*cell, marks=pytest.mark.exhaustive) for cell in MORE_ONNX)]
)
def test_onnx(tmp_path, name, deterministic, clip):
    model = MODELS[name]()
    difference = export_onnx(model, tmp_path / "x.onnx", deterministic=deterministic, clip=clip)
    assert difference < TOLERANCE and [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    graph = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {opset.domain for opset in graph.opset_import} == {""}, "plain operators alone"
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert NCSRConfig.from_dict(json.loads(metadata["config"])) == model.config
    assert metadata["scale"] == str(model.config.scale) and metadata["lr_multiple"] == "2"
    assert (json.loads(metadata["clip"]), json.loads(metadata["deterministic"])) == (clip, deterministic)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    described = json.loads(metadata["latents"])
    assert [i.name for i in session.get_inputs()] == ["lr", *(latent["name"] for latent in described)]
    for batch, height, width in [*SIZES, (1, 2, 2)]:
        lr, latents = inputs(model, batch, height, width)
        latents = [] if deterministic else latents
        shapes = [(batch, d["channels"], int(d["scale"] * height), int(d["scale"] * width)) for d in described]
        assert shapes == [tuple(latent.shape) for latent in latents]
        feed = {"lr": lr, **dict(zip((d["name"] for d in described), latents))}
        (found,) = session.run(["sr"], {key: value.numpy() for key, value in feed.items()})
        expected = decoded(model, lr, latents)
        expected = expected.clamp(0, 1) if clip else expected
        assert np.isfinite(found).all()
        assert (torch.from_numpy(found) - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)
    if name == "srflow-x4":
        with pytest.raises(Exception, match="(?i)broadcast|dimension|shape"):  # an odd size is refused, not decoded wrongly
            session.run(None, {"lr": np.zeros((1, 3, 5, 4), np.float32)})


@exports
def test_what_differs_from_the_model_is_not_written(tmp_path, monkeypatch):
    def wrong(self, *arguments):
        original(self, *arguments)
        self.eps += 0.01

    original = export._Level.__init__
    monkeypatch.setattr(export._Level, "__init__", wrong)
    with pytest.raises(ValueError, match="the ONNX graph differs from the model by .*not written"):
        export_onnx(tiny_model(), tmp_path / "x.onnx", deterministic=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value, message", [(torch.nan, "not finite"), (0.0, "singular")])
def test_models_that_cannot_be_exported(tmp_path, value, message):
    model = tiny_model()
    with torch.no_grad():
        model.levels[1].invconv[1] = value
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "x.onnx")
    model = randomize(NCSR(tiny_config()))
    with torch.no_grad():
        model.levels[0].couplings.bias3[0, 0] = torch.inf
    with pytest.raises(ValueError, match="levels.0.couplings.*bias, made of its weights, is not finite"):
        export_onnx(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"writing ONNX needs {package}: pip install 'ncsr_fast\[export\]'"):
        export_onnx(tiny_model(), tmp_path / "x.onnx")


def test_with_a_pytorch_that_cannot_export(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, opset_version, dynamo: None)  # the parameters of 2.4
    with pytest.raises(ImportError, match="exporting needs a newer PyTorch than .*: pip install --upgrade torch"):
        export_program(Decoder(tiny_model()))
    with pytest.raises(ImportError, match="exporting needs a newer PyTorch"):
        export_onnx(tiny_model(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [3, 999])
def test_an_opset_that_there_is_not(tmp_path, opset):
    with pytest.raises(ValueError, match=f"opset must be from 18 to .*, not {opset}"):
        export_onnx(tiny_model(dtype=torch.float32), tmp_path / "x.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
