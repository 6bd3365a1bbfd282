"""`ncsr-fast export`."""

from __future__ import annotations

import re

from support import exports

from ncsr_fast.cli.main import main


@exports
def test_export(model, tmp_path, capsys):
    assert main(["export", model, "--out", str(tmp_path / "x.onnx"), "--deterministic"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x.onnx: NCSR, noise-conditional, ×4, .*, largest difference to the model \d\.\de-0[5-9]", out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
