"""No command's output replaces what it reads, or another of its outputs; where one cannot be written, that is said at once."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from support import contents, tiny_model

from ncsr_fast.cli.main import main
from ncsr_fast.training.run import written_files

QUICK = ["--n", "1", "--temperatures", "0", "--model", "m"]
REFUSED = {
    "convert-report-source": ["convert", "m.pth", "--options", "c.json", "--out", "o", "--report", "m.pth"],
    "convert-report-options": ["convert", "m.pth", "--options", "c.json", "--out", "o", "--report", "c.json"],
    "convert-report-out": ["convert", "m.pth", "--options", "c.json", "--out", "o.pth", "--report", "o.pth"],
    "convert-report-folder": ["convert", "m.pth", "--options", "c.json", "--out", "o", "--report", "o"],
    "convert-report-config": ["convert", "m.pth", "--options", "c.json", "--out", "o", "--report", "o/config.json"],
    "convert-out-options": ["convert", "m.pth", "--options", "m/config.json", "--out", "m"],
    "convert-out-weights": ["convert", "m", "--out", "m/model.safetensors"],
    "convert-link": ["convert", "link.pth", "--options", "c.json", "--out", "m.pth"],
    "export-config": ["export", "m", "--out", "m/config.json", "--no-check"],
    "export-source": ["export", "m.pth", "--out", "m.pth", "--no-check"],
    "evaluate-image": ["evaluate", "photos", *QUICK, "--json", "photos/a.png"],
    "evaluate-among-images": ["evaluate", "photos", *QUICK, "--json", "photos/nested/new.json"],
    "evaluate-lr": ["evaluate", "photos", *QUICK, "--lr-images", "lr", "--json", "lr/a.png"],
    "evaluate-model": ["evaluate", "photos", *QUICK, "--json", "m/config.json"],
    "plot-log": ["plot", "run", "--out", "run/log.jsonl"],
    "bench-rows": ["bench", "--plot", "rows.json", "rows.json"],
    "train-yaml": ["train", "run/published_options.txt", "--run", "run"],
}


@pytest.fixture
def here(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained("m")
    torch.save(model.published_state_dict(), "m.pth")
    (tmp_path / "link.pth").symlink_to("m.pth")
    (tmp_path / "c.json").write_text((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"stage": "flow", "step": 1, "loss": 1, "nll": 1.0}) + "\n")
    (tmp_path / "run" / "published_options.txt").write_text(f"preset: ncsr-compact-x4\nimages: [{photos}]\n")
    shutil.copytree(photos, "lr")
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_read_is_not_replaced(here, name, capsys):
    before = contents(here)
    assert main(REFUSED[name]) == 1
    assert contents(here) == before
    err = capsys.readouterr().err
    assert err.startswith(f"ncsr-fast {REFUSED[name][0]}: ") and err.count("\n") == 1
    assert "would replace" in err or "', all of which is read; choose" in err


ALLOWED = {
    "convert-beside": ["convert", "m", "--out", "m/m.pth", "--report", "m/report.txt"],
    "evaluate-beside": ["evaluate", "photos", *QUICK, "--json", "m/scores.json"],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_files_beside_a_model_are_not_in_its_way(here, name):
    assert main(ALLOWED[name]) == 0


BLOCKED = {
    "plot": ["plot", "run", "--out", "photos"],
    "bench": ["bench", "--quick", "--out", "m.pth"],
    "bench-plot": ["bench", "--plot", "rows.json", "photos"],
}


@pytest.mark.parametrize("name", BLOCKED)
def test_a_file_for_a_folder_or_the_other_way_round(here, name, capsys):
    assert main(BLOCKED[name]) == 1
    out, err = capsys.readouterr()
    assert (
        not out and err.count("\n") == 1 and ("is a folder; give the file to write" in err or "is a file; give a folder" in err)
    )


PIPED = {
    "plot": ["plot", "run", "--out", "pipe"],
    "evaluate": ["evaluate", "photos", *QUICK, "--json", "pipe"],
    "gallery": ["gallery", "photos", "--model", "m", "--out", "pipe"],
}


@pytest.mark.parametrize("name", PIPED)
def test_a_device_or_pipe_is_not_replaced_by_a_file(here, name, capsys):
    os.mkfifo("pipe")
    assert main(PIPED[name]) == 1
    err = capsys.readouterr().err
    assert "'pipe' is a device or a pipe" in err and err.count("\n") == 1
    assert (here / "pipe").is_fifo()


def test_a_run_writes_the_files_it_is_said_to_write(here, photos):
    small = ["channels=4", "growth=2", "blocks=2", "stacked_blocks=0,1", "steps=1", "hidden_channels=4", "noise_steps=0,1,1"]
    steps = [
        "--encoder-steps",
        "1",
        "--steps",
        "1",
        "--batch",
        "1",
        "--crop",
        "32",
        "--workers",
        "0",
        "--validation-size",
        "32",
    ]
    assert (
        main(["train", "--preset", "ncsr-compact-x4", "--images", str(photos), "--run", "new", *steps, "--model", *small]) == 0
    )
    listed = {str(path.relative_to("new")) for path in written_files(here.relative_to(here) / "new")}
    found = {name for name, content in contents(here / "new").items() if content is not None}
    others = {name for name in found if name.startswith(("checkpoints/", "samples/"))} | {"best/validation.json"}
    assert found - others == listed - {"lock", "published_options.txt"}
