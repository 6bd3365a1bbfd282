"""Models of the family through the real spandrel: recognised, no other's taken, and called as programs call its models."""

from __future__ import annotations

import importlib
import sys
import warnings
from unittest import mock

import pytest
import torch
from support import image, randomize, tiny_config, tiny_model

import ncsr_fast.spandrel as ours
from ncsr_fast import NCSR, CheckpointError, NCSRConfig
from ncsr_fast.checkpoints import models
from ncsr_fast.config import PRESETS
from ncsr_fast.data.low_light import crop_margins
from ncsr_fast.photographs import photograph_input

pytestmark = pytest.mark.slow  # importing torchvision takes seconds


@pytest.fixture(scope="module")
def spandrel():
    """The package; beside a CPU's torch without the operators of a torchvision made for CUDA, which cannot be loaded there."""
    pytest.importorskip("torchvision", exc_type=ImportError) if _is_loadable() else _import_without_operators()
    return pytest.importorskip("spandrel")


def _is_loadable() -> bool:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        return False
    except ImportError:
        pass
    return True


def _import_without_operators() -> None:
    with mock.patch("torch.library.register_fake", lambda name: lambda function: function):
        importlib.import_module("torchvision")


@pytest.fixture
def loader(spandrel, few_presets):
    """A loader whose registry is spandrel's with ours in it."""
    registry = spandrel.MAIN_REGISTRY.copy()
    ours.install(registry)
    return spandrel.ModelLoader(registry=registry)


@pytest.fixture
def few_presets(monkeypatch):
    """Among which a configuration is found sooner."""
    monkeypatch.setattr(models, "PRESETS", {name: PRESETS[name] for name in ("ncsr-compact-x4", "llflow-compact")})


@pytest.fixture(scope="module")
def model():
    return NCSR.from_pretrained("ncsr-compact-x4").eval()


@pytest.fixture(scope="module")
def lr():
    """Smooth, as photographs are."""
    return torch.linspace(0.2, 0.7, 90).view(1, 3, 5, 6)


@pytest.mark.parametrize("kind", ["published", "wrapped", "own"])
def test_files(loader, spandrel, model, lr, tmp_path, kind):
    """As the authors publish them, with DataParallel's prefix in a wrapper, and model.safetensors of a directory."""
    path = tmp_path / "net.pth"
    if kind == "own":
        path = model.save_pretrained(tmp_path) / "model.safetensors"
    elif kind == "published":
        torch.save(model.published_state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{name}": own for name, own in model.published_state_dict().items()}}, path)
    found = loader.load_from_file(path)
    assert isinstance(found, spandrel.ImageModelDescriptor) and found.architecture.id == "NCSR"
    assert (found.scale, found.input_channels, found.output_channels, found.purpose) == (4, 3, 3, "SR")
    assert found.tiling is spandrel.ModelTiling.INTERNAL and found.size_requirements.none
    assert found.tags == ["NCSR", "noise-conditional", "×4", "4 blocks", "4 steps per level"]
    with torch.no_grad():
        expected = model.sample(lr, 1, 0.0)[0]
    assert torch.equal(found(lr), expected)


def test_a_state_dict(loader, model, lr):
    """The same image whenever it is called; another temperature and seed where they are set."""
    found = loader.load_from_state_dict(model.published_state_dict())
    first = found(lr)
    assert first.shape == (1, 3, 20, 24) and 0 <= first.min() and first.max() <= 1
    torch.manual_seed(5)
    assert torch.equal(found(lr), first)
    found.model.temperature, found.model.seed = 0.8, 7
    assert torch.equal(found(lr), found(lr)) and not torch.equal(found(lr), first)
    assert torch.equal(found(lr), model.sample(lr, 1, 0.8, torch.Generator().manual_seed(7))[0])
    assert torch.equal(found(torch.cat([lr.flip(2), lr]))[1:], found(lr))


def test_a_directory_of_any_configuration(spandrel, lr, tmp_path):
    model = tiny_model(dtype=torch.float32, system="fs-ncsr", stacked_blocks=(1,)).eval()
    model.save_pretrained(tmp_path)
    found = ours.load(tmp_path)
    assert found.architecture is ours.load("llflow-compact").architecture
    with torch.no_grad():
        assert torch.equal(found(lr), model.sample(lr, 1, 0.0)[0])


@pytest.mark.parametrize("own", [False, True], ids=["published", "own"])
def test_what_fits_no_preset(loader, own):
    model = tiny_model()
    with pytest.raises(CheckpointError, match="the state dict fits no preset .*Give the model's configuration"):
        loader.load_from_state_dict(model.state_dict() if own else model.published_state_dict())


def test_weights_that_are_not_finite(loader, model):
    state = model.published_state_dict()
    next(iter(state.values())).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="NaN or infinite values"):
        loader.load_from_state_dict(state)


@pytest.mark.parametrize("dtype, unit", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
def test_half_precision(loader, model, lr, dtype, unit):
    """Told to be supported: images of that dtype, within a few of its units of rounding from those of float32."""
    found = loader.load_from_state_dict(model.published_state_dict())
    expected = found(lr)
    assert found.supports_half and found.supports_bfloat16
    image = found.to(dtype)(lr.to(dtype))
    assert image.dtype == found.dtype == dtype
    assert (image.float() - expected).abs().max() < 6 * unit
    assert found.float()(lr).dtype == torch.float32


@pytest.mark.exhaustive
def test_every_preset_is_recognised_and_by_nothing_else(loader):
    """Whatever the order in the registry. No two have the same published tensors, but FS-NCSR's NCSR's."""
    found: dict[tuple, str] = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = NCSR(NCSRConfig.preset(name))
        for state in (model.published_state_dict(), model.state_dict()):
            assert [each.architecture.id for each in loader.registry if each.detect(state)] == ["NCSR"]
        key = tuple((name, tensor.shape) for name, tensor in model.published_state_dict().items())
        assert found.setdefault(key, name) == name.removeprefix("fs-")


def test_tensors_that_several_models_have(loader, monkeypatch):
    """SRFlow-DA's networks and their residual variants, under this package's names: neither is guessed."""
    presets = {name: tiny_config(system=name, noise_channels=0, noise_steps=()) for name in ("srflow-da", "srflow-da-r")}
    monkeypatch.setattr(models, "PRESETS", {name: config.to_dict() for name, config in presets.items()})
    monkeypatch.setattr(NCSRConfig, "preset", presets.get)
    model = NCSR(presets["srflow-da-r"])
    with pytest.raises(
        CheckpointError, match="fits several models, SRFlow-DA, ×4, .*; SRFlow-DA-R, ×4, .*Give the model's conf"
    ):
        loader.load_from_state_dict(model.state_dict())
    found = loader.load_from_state_dict(model.published_state_dict())
    assert found.tags[0] == "SRFlow-DA-R"


OTHERS = {
    "ESRGAN": lambda package: package.ESRGAN(num_filters=4, num_blocks=1),
    "Compact": lambda package: package.Compact(num_feat=4, num_conv=1),
    "SPAN": lambda package: package.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=4),
    "OmniSR": lambda package: package.OmniSR(num_feat=8, res_num=1, block_num=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_stay_what_they_are(loader, name):
    package = importlib.import_module(f"spandrel.architectures.{name}")
    state = OTHERS[name](package).state_dict()
    assert not ours.recognises(state)
    assert loader.load_from_state_dict(state).architecture.id == name


def test_generators_stay_those_of_esrgan(loader):
    """The encoder of a flow alone, as SRFlow's and NCSR's programs begin training from, is a model of its own."""
    state = tiny_model(blocks=3, growth=32).encoder.published_state_dict()
    assert not ours.recognises(state)
    assert loader.load_from_state_dict(state).architecture.id == "ESRGAN"


def test_installing_twice(spandrel, few_presets, model):
    registry = spandrel.MAIN_REGISTRY
    count = len(registry)
    try:
        ours.install()
        ours.install()
        assert len(registry) == count + 1 and registry["NCSR"].architecture.id == ours.ID
        assert spandrel.ModelLoader().load_from_state_dict(model.published_state_dict()).scale == 4
    finally:
        registry.__dict__.update(spandrel.ArchRegistry().__dict__ | _without(registry, ours.ID))


def _without(registry, name: str) -> dict:
    """The attributes of a registry without an architecture, which nothing removes."""
    other = type(registry)()
    other.add(*(support for support in registry if support.architecture.id != name))
    return other.__dict__


def test_low_light_and_grey(loader):
    """What makes no image larger is a restoration; a low-light model reads what the command makes of the photograph."""
    dark = NCSR.from_pretrained("llflow-compact").eval()
    found = loader.load_from_state_dict(dark.published_state_dict())
    assert (found.scale, found.input_channels, found.output_channels, found.purpose) == (1, 3, 3, "Restoration")
    photo = image(3, 11, 9, seed=2).mul(255).round().to(torch.uint8)
    lr, margins = photograph_input(dark, photo)
    expected = crop_margins(dark.sample(lr, 1, 0.0)[0], margins)
    assert torch.equal(found((photo[None] - 0.4) / 255), expected)  # of floats the nearest levels
    config = tiny_config(system="ctflow", scale=1, noise_channels=0, noise_steps=())
    grey = randomize(NCSR(config)).eval()
    found = ours._descriptor(ours._architecture(), grey)
    assert (found.input_channels, found.output_channels) == (1, 1)
    assert found(image(1, 1, 8, 8, dtype=torch.float32)).shape == (1, 1, 8, 8)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ImportError, match=r"pip install 'ncsr_fast\[spandrel\]'"):
        ours.install()


def test_with_a_torchvision_of_another_torch(monkeypatch):
    def fails(name, *_):
        if name == "spandrel":
            raise RuntimeError("operator torchvision::nms does not exist")
        return imported(name, *_)

    imported = __import__
    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    monkeypatch.setattr("builtins.__import__", fails)
    with pytest.raises(ImportError, match="spandrel needs a torchvision that fits torch .*: operator torchvision::nms"):
        ours.install()


def test_pixels_that_are_not_finite_are_black_with_a_warning(loader, model, lr):
    found = loader.load_from_state_dict(model.published_state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.model.temperature = 1e6
        shown = found(lr)
    assert shown.isfinite().all() and "blew up" in str(caught[0].message)
