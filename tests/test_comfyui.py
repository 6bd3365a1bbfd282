"""The node file of ComfyUI, loaded and called as ComfyUI does it, without ComfyUI."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import sys
from unittest import mock

import pytest
import torch
from support import fresh_process

import ncsr_fast.spandrel
from ncsr_fast import NCSR
from ncsr_fast.data import write_image
from ncsr_fast.data.images import read_image, to_float

SOURCE = importlib.util.find_spec("ncsr_fast.comfyui").origin


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The file, copied into custom_nodes; ComfyUI takes the path without the suffix for its name."""
    file = tmp_path_factory.mktemp("custom_nodes") / "ncsr_nodes.py"
    shutil.copy(SOURCE, file)
    spec = importlib.util.spec_from_file_location(str(file.with_suffix("")), file)
    loaded = importlib.util.module_from_spec(spec)
    with mock.patch.object(ncsr_fast.spandrel, "install") as install:
        spec.loader.exec_module(loaded)
    assert install.call_count == 1
    return loaded


@pytest.fixture(scope="module")
def photos():
    """Two smooth images (2, 5, 6, 3)."""
    return torch.stack([torch.linspace(0.2, 0.7, 90), torch.linspace(0.6, 0.1, 90)]).view(2, 3, 5, 6).movedim(1, -1)


def execute(module, **given):
    """What ComfyUI does with a node: widgets that nothing was typed into have their defaults."""
    (node,) = module.NODE_CLASS_MAPPINGS.values()
    inputs = {name: options.get("default") for name, (_, options) in node.INPUT_TYPES()["required"].items()} | given
    assert node.RETURN_TYPES == ("IMAGE",)
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def test_the_interface(module):
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys() == {"NCSRFastSamples"}
    node = module.NODE_CLASS_MAPPINGS["NCSRFastSamples"]
    required = node.INPUT_TYPES()["required"]
    assert list(required) == list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:]
    assert [kind for kind, _ in required.values()] == ["IMAGE", "STRING", "INT", "FLOAT", "INT", "INT"]
    for kind, options in list(required.values())[2:]:
        assert options["min"] <= options["default"] <= options["max"], kind


def test_images(module, photos):
    """Those of the model by the same seed: n of the first image, then n of the second, whatever the batch."""
    found = execute(module, image=photos, n=2, seed=2**64 - 1)
    assert found.shape == (4, 20, 24, 3) and found.dtype == torch.float32 and found.is_contiguous()
    model = NCSR.from_pretrained("ncsr-compact-x4").eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2**64 - 1)
        expected = model.sample(photos[1:].movedim(-1, 1), 2, 0.8, generator)[0]
    assert torch.equal(found[2:].movedim(-1, 1), expected)
    assert torch.equal(execute(module, image=photos[1:], n=2, seed=2**64 - 1), found[2:])
    assert not torch.equal(execute(module, image=photos[1:], n=2, seed=1), found[2:])


def test_tiles_and_temperature(module, photos):
    calm = execute(module, image=photos[:1], temperature=0.0)
    assert torch.equal(calm, execute(module, image=photos[:1], temperature=0.0, seed=4))
    with mock.patch.object(NCSR, "sample", autospec=True, side_effect=NCSR.sample) as sample:
        tiled = execute(module, image=photos[:1], temperature=0.0, tile=2)
    assert sample.call_args.args[-1] == 2
    assert (tiled - calm).abs().max() < 1e-5


def test_the_samples_of_the_command(module, photos, tmp_path):
    """Of the same seed, temperature and model, to the 8 bits of its files."""
    from ncsr_fast.cli.main import main

    photo = photos[0].movedim(-1, 0).mul(255).round().to(torch.uint8)
    write_image(tmp_path / "a.png", photo)
    main(["sample", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--n", "2", "--seed", "5"])
    written = to_float(read_image(tmp_path / "out" / "a_sample00001.png"))
    found = execute(module, image=(photo / 255).movedim(0, -1)[None], n=2, seed=5)
    assert (found[1].movedim(-1, 0) - written).abs().max() <= 0.5 / 255 + 1e-6


def test_a_model_is_read_once(module, photos, tmp_path):
    NCSR.from_pretrained("ncsr-compact-x4").save_pretrained(tmp_path)
    with mock.patch.object(NCSR, "from_pretrained", side_effect=NCSR.from_pretrained) as read:
        for seed in (0, 1):
            execute(module, image=photos[:1], model=str(tmp_path), seed=seed)
    assert read.call_count == 1
    with pytest.raises(FileNotFoundError, match="no model at"):
        execute(module, image=photos[:1], model="nowhere")


@pytest.mark.parametrize("model, name", [("ncsr-compact-x4", "lr"), ("llflow-compact", "image")])
def test_images_that_no_model_reads(module, photos, model, name):
    """Models of both kinds say why; a low-light model's eight bits would hide NaN, and make bytes white."""
    photo = photos[:1]
    for image, said in [
        (
            torch.cat([photo, photo[..., :1]], -1),
            r"must have shape \(B, 3, H, W\), not \(1, 4, 5, 6\); leave out the alpha channel",
        ),
        (photo[:, :0], "must have shape .* with at least one image and one pixel"),
        (photo * float("nan"), "has 90 NaN or infinite values out of 90"),
        (photo * 255, "has values .*: divide by 255"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} {said}"):
            execute(module, image=image, model=model)


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**64, ValueError), (1.5, TypeError)])
def test_seeds_that_are_none(module, photos, seed, error):
    with pytest.raises(error, match="^seed must be "):
        execute(module, image=photos[:1], seed=seed)


@pytest.mark.slow
def test_without_spandrel(tmp_path):
    """There is the node nevertheless, and a line that says why nothing else is."""
    code = "import sys; sys.modules['spandrel'] = None; import ncsr_fast.comfyui as c; print(len(c.NODE_CLASS_MAPPINGS))"
    told = fresh_process(code, tmp_path)
    assert told.startswith("ncsr_fast: only the node, no models for Load Upscale Model: spandrel cannot be imported")
    assert told.endswith("\n1")


def test_the_module_needs_no_comfyui():
    assert not {name for name in sys.modules if name.partition(".")[0] in ("comfy", "folder_paths")}
