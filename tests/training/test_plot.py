"""The picture of a training log: what its panels say, not its pixels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from operator_cases import marked
from PIL import Image
from support import full_disk

import ncsr_fast
from ncsr_fast.cli.main import main
from ncsr_fast.training.plot import draw, plot, read_log

pytest.importorskip("matplotlib")

ROWS = [
    {"stage": "encoder", "step": 20, "loss": 0.2, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0},
    {"stage": "encoder", "step": 40, "loss": 0.1, "grad_norm": 0.5, "lr": 5e-4, "skipped": 0},
    {"stage": "encoder", "step": 40, "images": "validation", "validation": {"l1": 0.15, "psnr": 24.0}},
    {"stage": "flow", "step": 20, "loss": -1.0, "nll": -2.0, "l1": 0.1, "grad_norm": 50.0, "lr": 2e-4, "skipped": 0},
    {"stage": "flow", "step": 31, "event": "skipped", "where": "level 1"},
    {"stage": "flow", "step": 40, "loss": -3.0, "nll": -4.0, "l1": 0.1, "grad_norm": float("nan"), "lr": 1e-4, "skipped": 1},
    {
        "stage": "flow", "step": 40, "images": "validation",
        "validation": {
            "nll": -3.5, "psnr@0": 25.0, "ssim@0": 0.7, "lr_psnr@0": 40.0, "psnr@0.8": 24.0, "ssim@0.8": 0.65,
            "lr_psnr@0.8": 38.0, "saturated@0.8": 0.02, "nonfinite@0.8": 0.0, "round_trip": 1e-4, "smallest_scale": 0.05,
        },
    },
]  # fmt: skip


def panels(rows) -> dict:
    return {axes.get_title(): axes for axes in draw(rows, "a run").axes}


@pytest.fixture(scope="module")
def drawn() -> dict:
    """The panels of ROWS."""
    return panels(ROWS)


def curves(axes) -> dict:
    return {line.get_label(): [list(map(float, values)) for values in line.get_data()] for line in axes.get_lines()}


def test_every_panel_has_its_curves_and_units(drawn):
    assert {title: axes.get_ylabel() for title, axes in drawn.items()} == {
        "encoder: L1 loss": "mean |SR - HR|, images in [0, 1]",
        "flow: negative log-likelihood": "bits per HR pixel position",
        "learning rate": "Adam's learning rate",
        "gradient norm": "norm before clipping",
        "PSNR, validation images": "dB",
        "SSIM, validation images": "SSIM",
        "LR-PSNR, validation images": "dB",
        "samples out of range": "values of the samples, %",
        "invertibility": "largest error, and divisor",
    }
    assert all(axes.get_xlabel() == "step of the stage" and axes.get_legend() for axes in drawn.values())
    assert curves(drawn["encoder: L1 loss"]) == {"training": [[20, 40], [0.2, 0.1]], "on validation images": [[40], [0.15]]}
    nll = {"training": [[20, 40], [-2, -4]], "on validation images": [[40], [-3.5]]}
    assert curves(drawn["flow: negative log-likelihood"]) == nll
    assert curves(drawn["learning rate"]) == {"encoder": [[20, 40], [1e-3, 5e-4]], "flow": [[20, 40], [2e-4, 1e-4]]}
    psnr = {"encoder alone": [[40], [24]], "temperature 0": [[40], [25]], "temperature 0.8": [[40], [24]]}
    assert curves(drawn["PSNR, validation images"]) == psnr
    assert curves(drawn["LR-PSNR, validation images"])["temperature 0.8"] == [[40], [38]]
    out = {"saturated, temperature 0.8": [[40], [2]], "not finite, temperature 0.8": [[40], [0]]}
    assert curves(drawn["samples out of range"]) == out
    assert curves(drawn["invertibility"]) == {"round-trip error": [[40], [1e-4]], "smallest scale of a step": [[40], [0.05]]}


def test_skipped_steps_are_marked(drawn):
    axes = drawn["gradient norm"]
    found = curves(axes)
    assert found["flow: 1 skipped"][0] == [31]
    assert found["flow"] == [[20], [50]]  # the NaN left out
    assert axes.get_yscale() == "log"


def test_missing_keys_leave_out_panels():
    rows = [{"stage": "flow", "step": 1, "loss": -1.0}, {"event": "resumed"}, {"stage": "flow", "step": 2, "validation": {}}]
    assert list(panels(rows)) == ["flow: negative log-likelihood"]
    with pytest.raises(ValueError, match="nothing to plot"):
        draw(rows[1:], "a run")


def test_pictures_of_training_images_say_so():
    rows = [{"stage": "flow", "step": 1, "images": "training", "validation": {"psnr@0": 20.0}}]
    assert list(panels(rows)) == ["PSNR, training images"]


@pytest.mark.slow
def test_the_shipped_model_log_is_plotted(tmp_path):
    log = Path(ncsr_fast.__file__).parent / "models" / "ncsr-compact-x4" / "log.jsonl"
    (tmp_path / "log.jsonl").write_text(log.read_text() + '{"stage": "fl')  # the run was killed while it wrote
    assert plot(tmp_path) == tmp_path / "training.png"
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert "flow: negative log-likelihood" in panels(read_log(tmp_path))


def test_logs_that_cannot_be_plotted(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        plot(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows yet"):
        plot(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"stage": \n{"stage": "flow", "step": 1, "loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 of .* is not JSON"):
        plot(tmp_path)
    (tmp_path / "log.jsonl").write_text('3\n{"stage": "flow", "step": 1, "loss": 1}\n')
    with pytest.raises(ValueError, match="line 1 of .* is not a row of a log but '3'; remove the line"):
        plot(tmp_path)


@pytest.mark.slow
def test_the_command_writes_where_it_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert main(["plot", f"~/{tmp_path.name}", f"--out=~/{tmp_path.name}/picture.png"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert main(["plot", str(tmp_path / "nowhere")]) == 1


@marked("slow", lambda kind: kind == "PNG")
@pytest.mark.parametrize("name, kind", [("bare", "PNG"), ("new/deep/x.PNG", "PNG"), ("x.jpg", "JPEG")])
def test_the_picture_is_where_and_what_its_name_says(tmp_path, capsys, name, kind):
    run = tmp_path / "run$x^{$y"
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert main(["plot", str(run), "--out", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind
    assert main(["plot", str(run), "--out", str(tmp_path / "x.txt")]) == 1
    err = capsys.readouterr().err
    assert "x.txt': plots cannot be written as .txt; end the name in one of ." in err and ", .png, " in err


def test_a_plot_that_fails_leaves_the_one_before(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    (tmp_path / "x.png").write_text("before")
    with full_disk(), pytest.raises(OSError, match="x.png"):
        plot(tmp_path, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'ncsr_fast\[train\]'"):
        draw(ROWS, "a run")
