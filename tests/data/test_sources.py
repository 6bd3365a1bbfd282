"""Places of images, and what is said of those that are none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from ncsr_fast.data.sources import list_sources


@pytest.fixture
def pictures(tmp_path):
    """Makes images of these names."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)

    return make


def pairs(root: Path) -> list[tuple[str, str]]:
    return [(a.name, b.name) for a, b in list_sources([root / "hr"], [root / "lr"])]


@pytest.mark.parametrize("folder", ["hr", "lr"])
def test_two_files_of_one_stem_are_refused(pictures, tmp_path, folder):
    pictures("hr/a.png", "hr/sub/b.png", "lr/a.png", "lr/sub/b.png")
    assert pairs(tmp_path) == [("a.png", "a.png"), ("b.png", "b.png")]
    pictures(f"{folder}/sub/b.jpg")
    named = f"{folder}/sub/b.jpg' and '.*{folder}/sub/b.png' would both be the image 'sub/b' of a pair; remove one of them"
    with pytest.raises(ValueError, match=named):
        pairs(tmp_path)


def test_lr_images_without_a_partner_are_named(pictures, tmp_path):
    pictures("hr/a.png", "lr/ax4.png", "lr/b.png", "lr/sub/a.png")
    with pytest.warns(UserWarning, match="2 LR images have no HR partner in '.*hr': .*lr/b.png.*lr/sub/a.png"):
        assert pairs(tmp_path) == [("a.png", "ax4.png")]
    pictures("hr/b.png", "hr/sub/a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(pairs(tmp_path)) == 3


@pytest.mark.parametrize(
    "place, error, message",
    [
        ("none", FileNotFoundError, "^v: there is no 'none'; relative paths are relative to the current folder, '.+'"),
        ("none.pklv4", FileNotFoundError, "^v: there is no 'none.pklv4'"),
        ("*.png", ValueError, r"^v: '\*.png' is a pattern, and patterns are not expanded; give the folder, '.': all"),
        ("hr/s?b/*.png", ValueError, r"is a pattern.*give the folder, 'hr': all"),
        ("hr/a.png", ValueError, "^v: 'hr/a.png' is one image; give a folder of images, such as 'hr'"),
        ("a.txt", ValueError, "^v: 'a.txt' is neither a folder of images nor a .pklv4 file"),
    ],
)
def test_no_places(pictures, tmp_path, monkeypatch, place, error, message):
    monkeypatch.chdir(tmp_path)
    pictures("hr/a.png")
    (tmp_path / "a.txt").touch()
    for places in ([Path(place)], []), ([Path("hr")], [Path(place)]):
        with pytest.raises(error, match=message):
            list_sources(*places, ("v", "v"))


def test_a_folder_may_look_like_a_pattern(pictures, tmp_path):
    pictures("of [2020]/a.png")
    assert len(list_sources([tmp_path / "of [2020]"], [])) == 1
