"""`ncsr-fast demo`."""

from __future__ import annotations

import pytest
import torch

from ncsr_fast.cli.main import main
from ncsr_fast.data import read_image


@pytest.mark.slow
def test_demo(model, tmp_path, capsys):
    assert main(["demo", "--model", model, "--out", str(tmp_path), "--n", "3"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("astronaut", "chelsea", "coffee", "LR-PSNR", "diversity", "s/sample"))
    sheet = read_image(tmp_path / "contact_sheet.png")
    assert sheet.shape[2] > 8 * 240 and sheet.shape[1] > 3 * 240
    assert len(list(tmp_path.glob("*_sample*.png"))) == 9


@pytest.mark.slow
def test_demo_of_dark_photographs(low_light_model, tmp_path, capsys):
    data = pytest.importorskip("skimage.data")
    arguments = ["demo", "--photographs", "chelsea", "--model", low_light_model, "--out", str(tmp_path), "--n", "3"]
    assert main([*arguments, "--window", "200"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("chelsea", "PSNR dark", "at reference brightness"))
    assert "astronaut" not in out and len(list(tmp_path.glob("chelsea_sample*.png"))) == 3
    sheet = read_image(tmp_path / "contact_sheet.png")
    original = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[:, 20:220, 110:310]
    assert torch.equal(sheet[:, 22:222, -204:-4], original)
    dark, likely = sheet[:, 22:222, 4:204].float(), sheet[:, 22:222, 208:408].float()
    assert dark.mean() < 0.5 * original.float().mean() and not torch.equal(dark, likely)
