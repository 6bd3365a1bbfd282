"""What is written is not what is read, whatever the two are called."""

from __future__ import annotations

import os

import pytest

from ncsr_fast.files import SHIPPED
from ncsr_fast.places import check_apart, files_of_model, holds


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a file in another one, and links to both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a").touch()
    (tmp_path / "folder").symlink_to("in")
    (tmp_path / "file").symlink_to("in/deep/a")
    os.link("in/deep/a", "second")


@pytest.mark.parametrize(
    "folder, path, expected",
    [
        ("in", "in", True), ("in", "in/deep/new", True), ("in", "folder/deep/a", True), ("folder", "in/deep", True),
        ("in/deep", "file", True), ("in/new", "in/NEW/more", True), ("new", "NEW/more", True),
        ("in/deep", "in", False), ("in", "deep", False), ("in/de", "in/deep", False), ("new", "newer", False),
    ],
)  # fmt: skip
def test_in_a_folder(folder, path, expected):
    assert holds(folder, path) is expected


@pytest.mark.parametrize("written", ["in/deep/a", "./in/../in/deep/a", "folder/deep/a", "file", "second"])
@pytest.mark.parametrize("read", ["in/deep/a", "file"])
def test_a_file_that_is_read(written, read):
    with pytest.raises(ValueError, match=f"^--out: '.*' would replace the input '{read}', which is read; choose another file"):
        check_apart({"--out": ["other", written]}, {"the input": [read]})


@pytest.mark.parametrize("written", ["in/new", "folder/deep/new", "in/new/new"])
def test_a_file_in_a_folder_that_is_read(written):
    with pytest.raises(ValueError, match=f"^--out: '{written}' would be in the input 'in', all of which is read; choose"):
        check_apart({"--out": [written]}, {"the input": ["in"]})


@pytest.mark.parametrize("second", ["new", "./new", "NEW", "folder/../new"])
def test_two_files_that_are_one(second):
    with pytest.raises(ValueError, match="^--report: '.*' would replace --out 'new'; choose another file"):
        check_apart({"--out": ["new"], "--report": [second]}, {})


def test_all_else_is_as_it_may_be():
    check_apart({"--out": ["new", "in/new", "x/in/deep/a"], "--report": []}, {"the input": ["in/deep/a", "nowhere"]})


def test_the_files_of_a_model():
    assert [path.name for path in files_of_model("in")] == ["config.json", "model.safetensors"]
    assert files_of_model("ncsr-compact-x4")[0].parent == SHIPPED / "ncsr-compact-x4"
    assert files_of_model("user/name") == []
    os.makedirs("run/checkpoints")
    for name in ("run/checkpoints/flow-1.pt", "run/net.pth"):
        open(name, "w").close()
    assert [path.name for path in files_of_model("run/checkpoints/flow-1.pt")] == ["flow-1.pt", "settings.json"]
    assert [path.name for path in files_of_model("run/net.pth")] == ["net.pth"]
