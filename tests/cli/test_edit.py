"""`ncsr-fast edit`: what its tools write is what the functions return."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast import NCSR, latents
from ncsr_fast.cli.main import main
from ncsr_fast.data import read_image, to_float
from ncsr_fast.metrics.fidelity import to_uint8


@pytest.fixture
def files(tmp_path):
    """An LR image of 6×8 pixels, an HR image of it and a content of 5×6."""
    generator = np.random.default_rng(0)
    for name, (height, width) in {"lr": (6, 8), "hr": (24, 32), "content": (5, 6)}.items():
        Image.fromarray(generator.integers(80, 180, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def edit(model, files, tool, *arguments):
    names = [str(files / name) if str(name).endswith(".png") or name == "out" else str(name) for name in arguments]
    return main(["edit", tool, *names, "--model", model, "--device", "cpu"])


def flow_of(model, files):
    """The flow of the LR image, and the pixels of a file."""
    model = NCSR.from_pretrained(model).requires_grad_(False)

    def pixels(name):
        return to_float(read_image(files / name))[None].double()

    return model.condition(pixels("lr.png")), pixels


def drawn(flow, seed):
    return [latent[:, 0] for latent in flow.draw(1, 0.4, torch.Generator().manual_seed(seed))]


def assert_written(file, images):
    assert torch.equal(read_image(file), to_uint8(images[0]))


def test_interpolate(settled, files, capsys):
    assert edit(settled, files, "interpolate", "lr.png", "--seeds", 3, 4, "--steps", 3, "--out", "out") == 0
    assert capsys.readouterr().out == f"3 images → {files / 'out'}\n"
    main(["sample", str(files / "lr.png"), "--model", settled, "--n", "1", "--seed", "4", "--out", str(files / "samples")])
    flow, _ = flow_of(settled, files)
    middle = latents.interpolate(drawn(flow, 3), drawn(flow, 4), 0.5)
    assert_written(files / "out" / "lr_step001.png", latents.images_of(flow, middle))
    assert torch.equal(read_image(files / "out" / "lr_step002.png"), read_image(files / "samples" / "lr_sample00000.png"))


@pytest.mark.parametrize("given", [False, True])
def test_redraw(settled, files, given):
    inputs = ["lr.png", "hr.png"] if given else ["lr.png"]
    assert edit(settled, files, "redraw", *inputs, "--box", 1, 2, 3, 2, "--n", 2, "--seed", 5, "--out", "out") == 0
    flow, pixels = flow_of(settled, files)
    before = flow.encode(pixels("hr.png")).latents if given else drawn(flow, 5)
    generator = torch.Generator().manual_seed(6)
    for index in range(2):
        expected = latents.redraw(flow, before, latents.box_mask(flow.lr, 1, 2, 3, 2), 0.4, generator)
        assert_written(files / "out" / f"lr_redrawn00{index}.png", expected)


def test_restore(settled, files):
    arguments = ["lr.png", "hr.png", "--window", 3, "--temperature", 0.3, "--out", "sharp.png"]
    assert edit(settled, files, "restore", *arguments) == 0
    flow, pixels = flow_of(settled, files)
    assert_written(files / "sharp.png", latents.restore(flow, pixels("hr.png"), 0.3, window=3))


def test_transfer(settled, files):
    """The mask has the LR pixels that the content lies in, at row 6 and column 9: rows 1 to 2, columns 2 to 3."""
    assert edit(settled, files, "transfer", "lr.png", "hr.png", "content.png", "--at", 6, 9, "--out", "edited.png") == 0
    flow, pixels = flow_of(settled, files)
    pasted = latents.paste(pixels("hr.png"), pixels("content.png"), 6, 9)
    assert_written(files / "edited.png", latents.transfer(flow, pasted, latents.box_mask(flow.lr, 1, 2, 2, 2), 0.4))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("interpolate", "lr.png", "--steps", 1, "--out", "out"), "--steps counts the two ends"),
        (("redraw", "lr.png", "--box", 0, 0, 9, 1, "--out", "out"), "must lie in the LR image, 8×6"),
        (("restore", "lr.png", "content.png", "--out", "x.png"), "hr must have shape"),
        (("restore", "lr.png", "hr.png", "--window", 2, "--out", "x.png"), "window must be an odd number"),
        (("restore", "lr.png", "hr.png", "--out", "hr.png"), "would replace the input"),
        (("transfer", "lr.png", "hr.png", "content.png", "--at", 20, 0, "--out", "x.png"), "must lie in the image, 32×24"),
        (("transfer", "lr.png", "hr.png", "nothing.png", "--at", 0, 0, "--out", "x.png"), "nothing.png"),
    ],
)
def test_what_cannot_be_edited(settled, files, capsys, arguments, message):
    before = sorted(files.iterdir())
    assert edit(settled, files, *arguments) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("ncsr-fast edit: ") and err.count("\n") == 1
    assert sorted(files.iterdir()) == before
