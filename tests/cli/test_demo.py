"""`ncsr-fast demo`."""

from __future__ import annotations

import pytest

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
