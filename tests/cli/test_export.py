"""`ncsr-fast export`."""

from __future__ import annotations

import re

import pytest
from support import exports

from ncsr_fast.cli.main import main


@exports
@pytest.mark.exhaustive  # tests/test_export.py exports, and test_flags_arrive has the command
def test_export(model, tmp_path, capsys):
    assert main(["export", model, "--out", str(tmp_path / "x.onnx"), "--deterministic"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x.onnx: NCSR, noise-conditional, ×4, .*, largest difference to the model \d\.\de-0[5-9]", out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize("flags, expected", [
    ([], {"deterministic": False, "clip": True, "opset": 18, "check": True}),
    (["--deterministic", "--no-clip", "--opset", "20", "--no-check"],
     {"deterministic": True, "clip": False, "opset": 20, "check": False}),
])  # fmt: skip
def test_flags_arrive(flags, expected, model, tmp_path, monkeypatch, capsys):
    given = {}

    def export_onnx(model, out, **options):
        given.update(options)
        return 2e-7 if options["check"] else None

    monkeypatch.setattr("ncsr_fast.export.export_onnx", export_onnx)
    assert main(["export", model, "--out", str(tmp_path / "x.onnx"), *flags]) == 0
    said = "largest difference to the model 2.0e-07" if expected["check"] else "not compared"
    assert given == expected and capsys.readouterr().out.endswith(f", {said}\n")
