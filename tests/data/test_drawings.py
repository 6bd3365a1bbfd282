"""Drawings: each kind shows what it is named after, a seed decides all of it, and folders are what a run trains on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import contents

from ncsr_fast.data import RandomCrops
from ncsr_fast.data.drawings import KINDS, draw, draw_folder, main


def drawings(kind: str, height: int = 40, width: int = 56) -> list[torch.Tensor]:
    return [draw(kind, height, width, seed) for seed in range(20)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_all_of_an_image(kind):
    images = drawings(kind)
    assert all(image.dtype == torch.uint8 and image.shape == (3, 40, 56) for image in images)
    assert all(torch.equal(image, again) for image, again in zip(images, drawings(kind)))
    assert len({image.numpy().tobytes() for image in images}) > 10, "other seeds, other images"
    assert draw(kind, 1, 1).shape == (3, 1, 1)


def colors(image: torch.Tensor) -> int:
    return len(torch.unique(image.flatten(1), dim=1).T)


def test_what_kinds_show():
    assert {colors(image) for image in drawings("flat")} == {1}
    assert {colors(image) for image in drawings("stripes") + drawings("checkerboard")} <= {1, 2}
    assert max(colors(image) for image in drawings("ramp")) > 50
    steps = [image.int().diff(dim=axis).abs().max() for image in drawings("ramp") for axis in (1, 2)]
    assert max(steps) <= 255 / 39 + 1, "a ramp has no edges"
    assert min(colors(image) for image in drawings("noise")) > 20
    for image in drawings("text", 64, 64):
        values, counts = torch.unique(image.flatten(1), dim=1, return_counts=True)
        assert counts.max() > 0.5 * 64 * 64, "paper"
    assert sum(colors(image) > 2 for image in drawings("text", 64, 64)) > 10, "letters with smooth edges"
    assert sum(colors(image) > 3 for image in drawings("screenshot", 64, 64)) > 10


def test_a_checkerboard_alternates():
    squares = [image for image in drawings("checkerboard") if colors(image) == 2]
    assert squares
    for image in squares:
        changes = (image[:, 1:] != image[:, :-1]).any(0)
        rows = changes.all(1)
        assert rows.any() and torch.equal(rows, changes.any(1)), "all columns change in the same rows"


def test_a_folder_is_trained_on(tmp_path):
    written = draw_folder(tmp_path / "a", count=2, size=16, seed=3)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in written)
    assert len(written) == 2 * len(KINDS) and len(RandomCrops(tmp_path / "a", scale=4, crop=16)) == len(written)
    draw_folder(tmp_path / "b", count=2, size=16, seed=3)
    draw_folder(tmp_path / "c", count=2, size=16, seed=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_the_command(tmp_path, capsys):
    main([str(tmp_path / "out"), "--count", "1", "--size", "8", "--seed", "5"])
    assert capsys.readouterr().out == f"{len(KINDS)} images in {tmp_path / 'out'}\n"
    draw_folder(tmp_path / "same", count=1, size=8, seed=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "same")


@pytest.mark.parametrize("words, said", [
    (["out", "--size", "0"], "size must be at least 1, not 0"),
    (["out", "--count", "0"], "count must be at least 1, not 0"),
    (["file/out"], ".*file.*"),
])  # fmt: skip
def test_the_command_says_what_is_wrong_in_a_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    assert re.fullmatch(rf"python -m ncsr_fast.data.drawings: {said}\n", capsys.readouterr().err)
    assert not Path("out").exists()


@pytest.mark.parametrize("kind, height, said", [
    ("photograph", 8, "kind must be one of flat, .*, not 'photograph'"),
    ("flat", 0, "height and width must be 1 or more, not 0 and 8"),
])  # fmt: skip
def test_arguments(kind, height, said):
    with pytest.raises(ValueError, match=said):
        draw(kind, height, 8)
