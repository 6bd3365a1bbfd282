"""`ncsr-fast sample`: what it writes, what it passes over, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_model

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
