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


@pytest.mark.parametrize("name, flags, expected", [
    ("x.onnx", [], {"deterministic": False, "clip": True, "check": True}),
    ("x.onnx", ["--deterministic", "--no-clip", "--opset", "20", "--no-check"],
     {"deterministic": True, "clip": False, "opset": 20, "check": False}),
    ("x.pt2", [], {"deterministic": False, "clip": True, "check": True}),
    ("x.pt2", ["--deterministic", "--no-clip", "--no-check"], {"deterministic": True, "clip": False, "check": False}),
])  # fmt: skip
def test_flags_arrive(name, flags, expected, model, tmp_path, monkeypatch, capsys):
    given = {}

    def written(model, out, **options):
        given.update(options)
        return 2e-7 if options["check"] else None

    monkeypatch.setattr(f"ncsr_fast.export.export_{'package' if name.endswith('.pt2') else 'onnx'}", written)
    assert main(["export", model, "--out", str(tmp_path / name), *flags]) == 0
    said = "largest difference to the model 2.0e-07" if expected["check"] else "not compared"
    assert given == expected and capsys.readouterr().out.endswith(f", {said}\n")


def test_an_opset_of_a_package(model, tmp_path, capsys):
    assert main(["export", model, "--out", str(tmp_path / "x.pt2"), "--opset", "18"]) != 0
    assert "--opset is of ONNX, but x.pt2 ends in .pt2" in capsys.readouterr().err
