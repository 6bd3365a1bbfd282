"""`ncsr-fast sample`: what it writes, what it passes over, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from support import full_disk, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.cli.main import main
from ncsr_fast.data import read_image


@pytest.mark.parametrize("names, expected", [("ntire", "00000{}_sample0000{}.png"), ("source", None)])
def test_sample_a_folder(model, photos, tmp_path, names, expected):
    out = tmp_path / "out"
    assert main(["sample", str(photos), "--out", str(out), "--model", model, "--n", "2", "--names", names]) == 0
    if expected:
        wanted = {expected.format(i, k) for i in range(3) for k in range(2)}
    else:
        wanted = {f"{stem}_sample0000{k}.png" for stem in ("a", "b", "nested/c") for k in range(2)}
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == wanted
    assert all(read_image(path).shape == (3, 384, 480) for path in out.rglob("*.png"))


def test_sample_one_odd_image_is_the_model(model, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    arguments = [
        "sample",
        str(tmp_path / "x.png"),
        "--out",
        str(tmp_path),
        "--model",
        model,
        "--n",
        "1",
        "--seed",
        "3",
        "--names",
        "source",
    ]
    assert main([*arguments, "--temperature", "0.5", "--device", "cpu"]) == 0
    with torch.no_grad():
        lr = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
        expected = NCSR.from_pretrained(model).sample(lr, 1, 0.5, torch.Generator().manual_seed(3))[0, 0]
    assert torch.equal(read_image(tmp_path / "x_sample00000.png"), expected.mul(255).round().to(torch.uint8))


def test_sample_goes_on_after_a_broken_file_and_reports_it(model, photos, tmp_path, capsys):
    (photos / "aa.png").write_text("broken")
    assert main(["sample", str(photos), "--out", str(tmp_path / "out"), "--model", model, "--n", "1"]) == 1
    assert "cannot read image" in capsys.readouterr().err
    # numbers are places in the sorted input, so a broken file leaves a gap and shifts nothing
    assert sorted(p.name[:6] for p in (tmp_path / "out").iterdir()) == ["000000", "000002", "000003"]


def test_sample_reports_samples_that_are_not_finite(photos, tmp_path, capsys):
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.levels[0].actnorm_logs.fill_(-60)  # decoding multiplies by exp(60) a step
    model.save_pretrained(tmp_path / "model")
    arguments = [
        "sample",
        str(photos / "a.png"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "model"),
        "--n",
        "2",
    ]
    with pytest.warns(RuntimeWarning, match="2 of 2 samples.*level 1, step 0"):
        assert main(arguments) == 1
    assert "2 of 2 samples of" in capsys.readouterr().err


def images(folder, *names, size=(6, 4)):
    """Small flat pictures of these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (60, 120, 180)).save(folder / name)
    return folder


def sample(model, *arguments):
    return main(["sample", *map(str, arguments), "--model", model, "--n", "1", "--device", "cpu"])


def outputs(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("second", ["a.jpg", "A.png", "a.tif"])
def test_samples_that_would_have_the_same_names(model, tmp_path, capsys, second):
    """Also where only a file system without a difference between A and a would take them for the same."""
    images(tmp_path / "in", "a.png", second, "b.png")
    arguments = (tmp_path / "in", "--out", tmp_path / "out")
    assert sample(model, *arguments, "--names", "source") == 1
    err = capsys.readouterr().err
    assert "a.png'" in err and f"{second}'" in err and "would have the same names" in err and not (tmp_path / "out").exists()
    assert sample(model, *arguments) == 0
    assert len(outputs(tmp_path / "out")) == 3


def test_the_same_name_in_two_folders(model, tmp_path):
    images(tmp_path / "in", "x/a.png", "y/a.png")
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 0
    assert outputs(tmp_path / "out") == ["x/a_sample00000.png", "y/a_sample00000.png"]


@pytest.mark.parametrize("source, out", [("in", "in"), ("in", "in/out"), ("in", "disk/out"), ("in/*.png", "in"), ("in", "all")])
def test_samples_that_would_be_input(model, tmp_path, capsys, source, out):
    """In the folder itself, one in it, one that a link in it leads to, one above it by the name of an image."""
    images(tmp_path / "in", "a.png", "in/c.png")
    images(tmp_path, "disk/b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "all").symlink_to(tmp_path)
    before = outputs(tmp_path)
    assert sample(model, tmp_path / source, "--out", tmp_path / out, "--names", "source") == 1
    assert "would be input of the next run" in capsys.readouterr().err
    assert outputs(tmp_path) == before


@pytest.mark.parametrize("source, out", [("in", "."), ("in/*.png", "in/out")])
def test_samples_beside_the_input(model, tmp_path, source, out):
    images(tmp_path / "in", "a.png")
    for _ in range(2):
        assert sample(model, tmp_path / source, "--out", tmp_path / out) == 0
    assert outputs(tmp_path / out) == sorted(["000000_sample00000.png", *(["in/a.png"] if out == "." else [])])


@pytest.mark.parametrize("made", ["b_sample00000.png", "nested"])
def test_something_else_in_the_place_of_a_sample(model, tmp_path, capsys, made):
    """Of one image; the others are sampled."""
    images(tmp_path / "in", "a.png", "nested/b.png" if made == "nested" else "b.png", "z.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / made).touch() if made == "nested" else (tmp_path / "out" / made).mkdir()
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 1
    assert {"a_sample00000.png", "z_sample00000.png"} <= set(outputs(tmp_path / "out"))
    out, err = capsys.readouterr()
    assert "2 of 3 images" in out and "b.png': a folder is where a sample, or a file where a folder of samples should be" in err


def test_a_sample_that_would_replace_an_input(model, tmp_path, capsys):
    images(tmp_path, "a.png", "a_sample00000.png")
    before = (tmp_path / "a_sample00000.png").read_bytes()
    both = (tmp_path / "a.png", tmp_path / "a_sample00000.png")
    assert sample(model, *both, "--out", tmp_path, "--names", "source") == 1
    assert "would replace the input" in capsys.readouterr().err
    assert (tmp_path / "a_sample00000.png").read_bytes() == before


def test_samples_of_an_earlier_run_are_replaced_or_named(model, tmp_path, capsys):
    images(tmp_path, "a.png")
    images(tmp_path / "out", "a_sample00000.png", "a_sample00001.png", size=(1, 1))
    assert sample(model, tmp_path / "a.png", "--out", tmp_path / "out", "--names", "source") == 0
    assert read_image(tmp_path / "out" / "a_sample00000.png").shape == (3, 16, 24)
    assert re.search("1 samples of an earlier run are still in the folder: '.*a_sample00001.png'\n", capsys.readouterr().err)


def test_several_inputs_patterns_and_home(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images(tmp_path, "a.png", "b.png", "more/c.png", "odd[1].png")
    inputs = ("~/a.png", f"{tmp_path}/[ab].png", "~/more", "~/odd[1].png")
    assert main(["sample", *inputs, "--out=~/out", "--model", model, "--n", "1", "--names", "source"]) == 0
    assert outputs(tmp_path / "out") == [f"{stem}_sample00000.png" for stem in ("a", "b", "c", "odd[1]")], "a once"
    assert sample(model, f"{tmp_path}/z*.png", "--out", tmp_path / "out") == 1
    assert re.search(r"no file matches '.*z\*.png'", capsys.readouterr().err)


def test_an_image_too_large_for_memory_is_passed_over(model, photos, tmp_path, capsys, monkeypatch):
    call = NCSR.sample

    def limited(self, lr, *arguments, **options):
        if lr.shape[2] == 50:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")
        return call(self, lr, *arguments, **options)

    monkeypatch.setattr(NCSR, "sample", limited)
    images(tmp_path / "in", "a.png", "c.png")
    images(tmp_path / "in", "b.png", size=(60, 50))
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 1
    out, err = capsys.readouterr()
    assert outputs(tmp_path / "out") == ["a_sample00000.png", "c_sample00000.png"]
    assert "b.png' with 1 samples does not fit in memory: draw fewer (--n), use a smaller --model, or crop it" in err
    assert out.startswith("2 of 3 images × 1 samples → ") and err.endswith("1 of 3 images were not sampled as asked\n")


def test_nonfinite_samples_of_one_image_do_not_end_a_folder(tmp_path, capsys, recwarn, monkeypatch):
    broken = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        broken.levels[0].actnorm_bias[0] = torch.nan
    monkeypatch.setattr(NCSR, "from_pretrained", lambda path: broken)  # no file with such weights is loaded
    images(tmp_path / "in", "a.png", "b.png")
    arguments = (tmp_path / "in", "--out", tmp_path / "out", "--on-nonfinite")
    assert sample(str(tmp_path / "model"), *arguments, "raise") == 1
    err = capsys.readouterr().err
    assert err.count("weights of the model are not finite") == 2 and "2 of 2 images were not sampled" in err
    assert not (tmp_path / "out").exists()
    assert sample(str(tmp_path / "model"), *arguments, "ignore") == 1
    assert capsys.readouterr().err.count("have pixels that are not finite, which are black. 1 weights of the model") == 2


def test_what_a_folder_holds_beside_images_is_named(model, tmp_path):
    images(tmp_path / "in", "a.png")
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.warns(UserWarning, match="left out: 1 that end in .txt"):
        assert sample(model, tmp_path / "in", "--out", tmp_path / "out") == 0


def test_names_too_long_for_a_file(model, tmp_path, capsys):
    images(tmp_path / "in", "a.png", f"{'n' * 245}.png")
    assert sample(model, tmp_path / "in", "--out", tmp_path / "out", "--names", "source") == 1
    assert "the names of its samples are too long; use --names ntire" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == ["a_sample00000.png"]


def test_a_full_disk(model, tmp_path, capsys):
    images(tmp_path, "a.png", size=(40, 30))
    with full_disk(20):
        assert sample(model, tmp_path / "a.png", "--out", tmp_path / "out") == 1
    assert re.search(r"sample: '.*000000_sample00000.png': File too large; .*\n$", capsys.readouterr().err)
    assert outputs(tmp_path / "out") == []
