"""What all subcommands share: help, and the one line users get for what they can mend."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from ncsr_fast.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  ncsr-fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("doctor",)])
def test_examples_parse(command):
    """The command line of every example is one the parser accepts."""
    from ncsr_fast.cli.main import build_parser

    line = next(
        line for line in importlib.import_module(f"ncsr_fast.cli.{command}").EXAMPLE.splitlines() if "ncsr-fast" in line
    )
    build_parser().parse_args(line.split()[1:])


def test_entry_point(tmp_path):
    command = [sys.executable, "-m", "ncsr_fast.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)  # not in the checkout
    assert done.stdout.startswith("ncsr-fast 0.")


FAILURES = {
    "no-model": (["sample", "{photos}", "--out", "{out}", "--model", "nowhere"], "no model at 'nowhere'; shipped models: "),
    "no-input": (["sample", "{out}/nothing", "--out", "{out}", "--model", "{model}"], "no file or folder"),
    "empty": (["evaluate", "{empty}", "--model", "{model}"], "holds no image"),
    "empty-train": (["train", "--images", "{empty}", "--run", "{out}"], "holds no image"),
    "few": (["demo", "--n", "2", "--model", "{model}"], "--n must be at least 3, not 2"),
    "device": (
        ["sample", "{photos}", "--out", "{out}", "--model", "{model}", "--device", "gpu"],
        "no device 'gpu': use cpu or cuda",
    ),
    "crop": (
        ["train", "--images", "{photos}", "--run", "{out}", "--crop", "90"],
        "crop must be a positive multiple of 2·scale = 8, not 90",
    ),
    "folder-for-yaml": (
        ["train", "{photos}", "--run", "{out}"],
        "should be a YAML file, not a folder; folders of images go in",
    ),
    "two-yamls": (["train", "{out}/a.yml", "-opt", "{out}/b.yml"], "b.yml' is a second YAML beside "),
    "convert-nothing": (["convert", "{out}/no.pth", "--out", "{out}"], "no model at "),
    "convert-itself": (["convert", "{model}", "--out", "{model}"], "out is the source itself, "),
    "options": (["convert", "{model}", "--out", "{out}", "--options", "{out}.yml"], "No such file"),
    "export-nothing": (["export", "nowhere", "--out", "{out}/x.onnx"], "no model at 'nowhere'; shipped models: "),
    "no-run": (["train", "--images", "{photos}"], "--run: should be the folder of the run, which only a YAML can leave out"),
    "no-images": (["train", "--run", "{out}"], "images is missing"),
    "wrong-type": (["train", "--images", "{photos}", "--run", "{out}", "--lr", "fast"], "lr: should be a number, not 'fast'"),
    "pair": (
        ["train", "--images", "{photos}", "--run", "{out}", "--model", "steps"],
        "--model: should be KEY=VALUE, not 'steps'",
    ),
    "train-device": (
        ["train", "--images", "{photos}", "--run", "{out}", "--device", "gpu"],
        "no device 'gpu': use cpu or cuda",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(name, model, photos, tmp_path, capsys):
    arguments, message = FAILURES[name]
    (tmp_path / "empty").mkdir()
    places = {"photos": photos, "out": tmp_path / "out", "model": model, "empty": tmp_path / "empty"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith(f"ncsr-fast {arguments[0]}: ") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_it(model, photos, tmp_path, capsys):
    assert main(["sample", str(photos), "--out", str(tmp_path), "--model", model, "--device", "cuda"]) == 1
    reason = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no CUDA device"
    assert f"device 'cuda' was asked for, but {reason}; use --device cpu" in capsys.readouterr().err
