"""`ncsr-fast convert`: there and back, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny_model

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.cli.main import main


@pytest.mark.slow
def test_convert_there_and_back(tmp_path, capsys):
    published = tiny_model(dtype=torch.float32).published_state_dict()
    torch.save({"params": {f"module.{name}": value for name, value in published.items()}}, tmp_path / "net.pth")
    (tmp_path / "options.json").write_text(json.dumps(tiny_model().config.to_dict()))
    there = ["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "model"), "--report", str(tmp_path / "report.txt")]
    assert main(there) == 1
    assert not (tmp_path / "model").exists() and not (tmp_path / "report.txt").exists()
    assert main([*there, "--options", str(tmp_path / "options.json")]) == 0
    assert "NCSR, noise-conditional, ×4, 2 blocks, 1 steps per level: 0 tensors of the same name" in capsys.readouterr().out
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert len(lines) == len(published)
    assert "params/module.flowUpsamplerNet.layers.1.invconv.weight → levels.0.invconv[0]" in lines
    assert "params/module.flowUpsamplerNet.f.0.bias → (dropped)" in lines
    assert main(["convert", str(tmp_path / "model"), "--out", str(tmp_path / "again.pth")]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again) == list(published)
    used = [name for name in again if not name.startswith("flowUpsamplerNet.f.") and "layers.2.affine.fAffine_std" not in name]
    assert all(torch.equal(again[name], published[name]) for name in used)


@pytest.mark.slow
def test_convert_names_every_tensor_that_does_not_fit(tmp_path, capsys):
    state = NCSR(NCSRConfig.preset("ncsr-compact-x4")).published_state_dict()
    gone = [name for name in state if name.endswith("fFeatures.0.weight")]
    assert len(gone) == 12, "more than an error message lists"
    state = {name: value for name, value in state.items() if name not in gone} | {"extra": torch.zeros(2)}
    state["RRDB.conv_first.bias"] = torch.zeros(31)
    torch.save(state, tmp_path / "net.pth")
    assert main(["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "model")]) == 1
    assert not (tmp_path / "model").exists()
    err = capsys.readouterr().err
    assert all(f"\n  {name}\n" in err for name in (*gone, "extra", "RRDB.conv_first.bias (31,), expected (32,)"))


def test_convert_reads_a_published_yaml(published_yaml, tmp_path, capsys):
    (tmp_path / "4x.yml").write_text(published_yaml.replace("NCSRNet", "NCSRNet\n  nb: 2\n  nf: 8\n  gc: 4"))
    shape = {"channels": 8, "growth": 4, "blocks": 2, "stacked_blocks": (1,), "steps": 2, "transition_steps": 0}
    config = NCSRConfig(**shape, noise_channels=3, noise_steps=(0, 2, 2))
    torch.save(NCSR(config).published_state_dict(), tmp_path / "net.pth")
    arguments = ["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "model"), "--options"]
    assert main([*arguments, str(tmp_path / "4x.yml")]) == 0
    assert NCSR.from_pretrained(tmp_path / "model").config == config
    (tmp_path / "4x.yml").write_text("scale: [")
    assert main([*arguments, str(tmp_path / "4x.yml")]) == 1
    err = capsys.readouterr().err
    assert "4x.yml' does not describe a model: " in err and err.count("\n") == 1
