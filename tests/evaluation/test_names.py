"""Files of the challenge, and what can be wrong with them before anything is measured."""

from __future__ import annotations

import re

import numpy as np
import pytest
from evaluation.folders import draw
from PIL import Image

from ncsr_fast.evaluation import PROTOCOLS, find_originals, find_samples
from ncsr_fast.evaluation.names import BadFiles


def found(hr, sr, n: int = 2, year: str = "ntire2021"):
    return find_samples(sr, find_originals(hr, PROTOCOLS[year]), n, 4)


def refused(hr, sr, n: int = 2, year: str = "ntire2021") -> list[str]:
    with pytest.raises(BadFiles) as caught:
        found(hr, sr, n, year)
    assert str(caught.value).endswith(caught.value.problems[0])
    return caught.value.problems


@pytest.fixture
def folders(tmp_path):
    return draw(tmp_path, 2)


def test_order_is_that_of_names(folders):
    hr, sr = folders
    samples = found(hr, sr)
    assert [file.name for file in samples[1]] == ["000001_sample00000.png", "000001_sample00001.png"]
    originals = find_originals(hr, PROTOCOLS["ntire2021"])
    assert originals.names == ["0801.png", "0802.png"]
    assert originals.notes() == ["2 originals, fewer than the challenge's 100: these are not its scores"]


def test_originals_of_other_names_are_noted(folders):
    hr, sr = folders
    (hr / "0801.png").rename(hr / "comic.png")
    notes = find_originals(hr, PROTOCOLS["ntire2021"]).notes()
    assert any("are not the challenge's 0801.png to 0900.png" in note for note in notes)
    Image.open(hr / "comic.png").save(hr / "comic.bmp")
    (hr / "comic.png").unlink()
    assert any("1 originals are not PNG files" in note for note in find_originals(hr, PROTOCOLS["ntire2021"]).notes())


@pytest.mark.parametrize("year, other, first", [("ntire2021", "ntire2022", 901), ("ntire2022", "ntire2021", 801)])
def test_originals_of_the_other_year(tmp_path, year, other, first):
    hr, sr = draw(tmp_path, 2, first)
    (problem,) = refused(hr, sr, year=year)
    assert f"are the originals of {other}, not of {year}: give --protocol {other}" in problem


def test_samples_of_the_other_year(tmp_path):
    hr, sr = draw(tmp_path, 2, 801, 901)
    (problem,) = refused(hr, sr)
    assert problem == "they begin at 000901, as those of ntire2022: give --protocol ntire2022"


def test_missing_samples(folders):
    hr, sr = folders
    (sr / "000001_sample00001.png").unlink()
    (sr / "000000_sample00000.png").unlink()
    first, second = refused(hr, sr)
    assert re.fullmatch(r"1 of 2 samples of original 000000 are missing: '.*000000_sample00000.png'", first)
    assert re.fullmatch(r"1 of 2 samples of original 000001 are missing: '.*000001_sample00001.png'", second)


def test_wrong_counts(folders):
    hr, sr = folders
    assert refused(hr, sr, 3)[0].startswith("1 of 3 samples of original 000000 are missing")
    (sr / "000000_sample00002.png").write_bytes((sr / "000000_sample00001.png").read_bytes())
    assert refused(hr, sr) == ["there are more than 2 samples of 1 originals, '000000': give their number as --n"]
    (sr / "000000_sample00002.png").rename(sr / "000002_sample00000.png")
    assert refused(hr, sr) == ["there are 2 originals, and samples of 1 more: '000002'"]


def test_other_names(folders):
    hr, sr = folders
    (problem,) = refused(hr, sr, 1)
    assert problem.startswith("4 files are called otherwise, '000000_sample00000.png'") and "has 000000.png" in problem
    (sr / "0801x4_sample00000.png").write_bytes(b"")
    (problem,) = refused(hr, sr)
    assert problem.startswith("1 files are called otherwise, '0801x4_sample00000.png'; ntire2021 with --n 2 has 000000_sample")
    for file in sr.iterdir():
        file.unlink()
    assert refused(hr, sr, year="ntire2021")[0].startswith("there are none; ntire2021")


def test_other_files_and_hidden_ones_are_left_alone(folders):
    hr, sr = folders
    (sr / "readme.txt").write_text("of the method")
    (sr / "._000000_sample00000.png").write_bytes(b"")
    assert len(found(hr, sr)) == 2


def test_no_png(folders):
    hr, sr = folders
    Image.open(sr / "000000_sample00000.png").save(sr / "000000_sample00000.jpg")
    (sr / "000000_sample00000.jpg").rename(sr / "000000_sample00000.png")
    (sr / "000001_sample00000.png").write_text("no image")
    first, second = refused(hr, sr)
    assert first.endswith("000000_sample00000.png' is not a PNG file")
    assert second.endswith("000001_sample00000.png' is not a PNG file")
    Image.open(hr / "0801.png").save(hr / "0801.jpg")
    (hr / "0801.jpg").rename(hr / "0801.png")
    (problem,) = refused(hr, sr)
    assert problem.endswith("0801.png' is not a PNG file, though it is called so")


def test_broken_off(folders):
    hr, sr = folders
    file = sr / "000001_sample00001.png"
    file.write_bytes(file.read_bytes()[:-100])
    (problem,) = refused(hr, sr)
    assert problem.endswith("000001_sample00001.png': it is broken off; copy it again")


@pytest.mark.parametrize("height, width", [(71, 90), (72, 87), (79, 90), (75, 94)])
def test_sizes_that_do_not_fit(folders, height, width):
    hr, sr = folders
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(sr / "000000_sample00001.png")
    (problem,) = refused(hr, sr)
    assert f"000000_sample00001.png' is {height}×{width} and its original 0801.png 75×90: " in problem
    assert problem.endswith("they should be of one size, or the sample 72×88")


@pytest.mark.parametrize("height, width", [(72, 88), (75, 90), (78, 93)])
def test_sizes_that_fit(folders, height, width):
    hr, sr = folders
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(sr / "000000_sample00001.png")
    assert len(found(hr, sr)) == 2


def test_originals_that_are_too_small(folders):
    hr, sr = folders
    Image.new("RGB", (7, 64)).save(hr / "0801.png")
    Image.new("RGB", (64, 7)).save(hr / "0802.png")
    first, second = refused(hr, sr)
    assert first.endswith("0801.png' is 64×7, less than 8×8, too small to be measured") and "0802.png" in second


def test_folders_that_are_not_there(folders, tmp_path):
    hr, sr = folders
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' of samples"):
        found(hr, tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="0801.png' is a file; give the folder that samples are in"):
        found(hr, hr / "0801.png")
