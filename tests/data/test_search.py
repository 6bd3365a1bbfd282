"""What a folder holds is listed, or named as left out."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from ncsr_fast.data import list_images
from ncsr_fast.data.images import SUFFIXES


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(SUFFIXES):
            Image.new("RGB", (4, 4)).save(folder / name)
        else:
            (folder / name).touch()
    return folder


def listed(folder):
    return [str(path.relative_to(folder)) for path in list_images(folder)]


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"contains no image \(\.png"):
        list_images(tmp_path)
    make(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match=r"contains no image .*; in it: 1 that end in \.txt \('notes.txt'\)"):
        list_images(tmp_path)
    with pytest.raises(NotADirectoryError, match="notes.txt' is a file; give the folder that contains it"):
        list_images(tmp_path / "notes.txt")


def test_listing(tmp_path, recwarn):
    assert listed(make(tmp_path, "b.PNG", "a.jpeg", "deep/er/c.webp", "d.tif", "e.tiff")) == [
        "a.jpeg", "b.PNG", "d.tif", "deep/er/c.webp", "e.tiff"
    ]  # fmt: skip
    assert not recwarn.list


def test_what_is_left_out_is_named(tmp_path):
    make(tmp_path, "a.png", *(f"{n}.txt" for n in range(5)), "x/README", ".b.png", ".git/c.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning) as caught:
        assert listed(tmp_path) == ["a.png"]
    said = str(caught[0].message)
    assert f"10 entries of {str(tmp_path)!r} are left out" in said
    for part in (
        "2 hidden ('.b.png', '.git')",
        "5 that end in .txt ('0.txt', '1.txt', '2.txt', …)",
        "1 whose names have no ending ('x/README')",
        "1 links that lead nowhere ('broken.png')",
        "1 that are neither files nor folders ('pipe.png')",
    ):
        assert part in said


def test_links_to_folders_and_files_are_followed(tmp_path, recwarn):
    data, disk = make(tmp_path / "data", "z.png"), make(tmp_path / "disk", "sub/y.png")
    (data / "flickr").symlink_to(disk, target_is_directory=True)
    make(tmp_path, "x.png")
    (data / "x.png").symlink_to(tmp_path / "x.png")
    assert listed(data) == ["flickr/sub/y.png", "x.png", "z.png"] and not recwarn.list


def test_what_two_links_lead_to_is_listed_once(tmp_path):
    """By its own path where it has one, whatever the links are called."""
    data = make(tmp_path / "data", "own/a.png", "z.png")
    make(tmp_path, "disk/b.png")
    for name, target in (("0", "own"), ("1", "../disk"), ("2", "../disk"), ("3.png", "z.png"), ("up", "."), ("out", "..")):
        (data / name).symlink_to(target)
    with pytest.warns(UserWarning) as caught:
        assert listed(data) == ["1/b.png", "own/a.png", "z.png"]
    said = str(caught[0].message)
    assert "6 that are listed under another path ('0', '2', '3.png', …)" in said, "out/data and out/disk among them"


def test_hard_links_are_files_of_their_own(tmp_path, recwarn):
    make(tmp_path, "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    assert listed(tmp_path) == ["a.png", "b.png"] and not recwarn.list


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "shut/b.png")
    scandir = os.scandir

    def refuse(path):
        if path == tmp_path / "shut":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(UserWarning, match=r"1 that cannot be opened: Permission denied \('shut'\)"):
        assert listed(tmp_path) == ["a.png"]
