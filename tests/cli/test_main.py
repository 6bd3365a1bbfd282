"""What all subcommands share: help, and the one line users get for what they can mend."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import warnings

import pytest
import torch
from forks import Fork

from ncsr_fast.cli._common import Gathered
from ncsr_fast.cli.main import COMMANDS, build_parser, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  ncsr-fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("doctor",)])
def test_examples_parse(command):
    """The command line of every example is one the parser accepts."""
    line = next(
        line for line in importlib.import_module(f"ncsr_fast.cli.{command}").EXAMPLE.splitlines() if "ncsr-fast" in line
    )
    build_parser().parse_args(line.split()[1:])


@pytest.mark.slow
def test_entry_point(tmp_path):
    command = [sys.executable, "-m", "ncsr_fast.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)  # not in the checkout
    assert done.stdout.startswith("ncsr-fast 0.")


FAILURES = {
    "no-model": (["sample", "{photos}", "--out", "{out}", "--model", "nowhere"], "no model at 'nowhere'; shipped models: "),
    "no-input": (["sample", "{out}/nothing", "--out", "{out}", "--model", "{model}"], "no file or folder"),
    "empty": (["evaluate", "{empty}", "--model", "{model}"], "contains no image"),
    "empty-train": (["train", "--images", "{empty}", "--run", "{out}"], "contains no image"),
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
    "two-yamls": (["train", "{out}/a.yml", "-opt", "{out}/b.yml"], "b.yml' is a second YAML file besides "),
    "convert-nothing": (["convert", "{out}/no.pth", "--out", "{out}"], "no model at "),
    "convert-itself": (["convert", "{model}", "--out", "{model}"], "' would replace the source "),
    "options": (["convert", "{model}", "--out", "{out}", "--options", "{out}.yml"], "No such file"),
    "export-nothing": (["export", "nowhere", "--out", "{out}/x.onnx"], "no model at 'nowhere'; shipped models: "),
    "no-run": (
        ["train", "--images", "{photos}"],
        "--run: should be the folder of the run; only with a YAML file may it be left out",
    ),
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


BAD_ARGUMENTS = {
    "no-path": (["sample", "a.png", "--out", ""], "argument --out: should be a path, not ''"),
    "no-samples": (["evaluate", "a", "--n", "0"], "argument --n: should be a whole number of 1 or more, not '0'"),
    "seed": (["sample", "a", "--out", "b", "--seed", "-1"], "argument --seed: should be a whole number from 0 to 2⁶⁴ - 1"),
    "nan": (["demo", "--temperature", "nan"], "argument --temperature: should be a number of 0 or more, not 'nan'"),
    "threads": (["bench", "--threads", "100000"], "argument --threads: should be a whole number from 1 to "),
    "no-threads": (["bench", "--threads", "0"], "8 per processor, not '0'"),
    "rounds": (["bench", "--rounds", "0"], "argument --rounds: should be a whole number of 1 or more"),
    "seconds": (["bench", "--seconds", "-1"], "argument --seconds: should be a number of seconds, 0 or more, not '-1'"),
    "limit": (["evaluate", "a", "--limit", "-1"], "argument --limit: should be a whole number of 1 or more"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_that_cannot_be(name, capsys):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def doctor(monkeypatch):
    """A way to replace what `ncsr-fast doctor` does."""
    return lambda function: monkeypatch.setattr("ncsr_fast.cli.doctor.run", function)


def raises(error):
    def run(*args):
        raise error

    return run


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(13, "Permission denied", "/x/y.png"), "'/x/y.png': Permission denied; change who may use it, or"),
        (OSError(28, "No space left on device", "/x/y.png"), "'/x/y.png': No space left on device; make room, or choose"),
        (FileNotFoundError("no model at 'x'"), "no model at 'x'"),
        (MemoryError(), "out of memory: none is left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore of it"), "out of memory: DefaultCPUAllocator: can't"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried …"), "out of memory: CUDA out of memory. Tried …"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_expected_errors_are_one_line(doctor, capsys, error, said):
    doctor(raises(error))
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ncsr-fast doctor: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a mistake of ours"), KeyError("x"), TypeError("x")], ids=repr)
def test_unexpected_errors_keep_their_traceback(doctor, error):
    doctor(raises(error))
    with pytest.raises(type(error)):
        main(["doctor"])


def test_an_interrupt_is_no_traceback(doctor, capsys):
    doctor(raises(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("where", ["import_module", "parser"])
def test_an_interrupt_before_the_command_is_known_is_none_either(monkeypatch, capsys, where):
    """As the modules of the commands, and of what they need, are imported."""
    program = importlib.import_module("ncsr_fast.cli.main")
    target = (program, "build_parser") if where == "parser" else (program.importlib, "import_module")
    monkeypatch.setattr(*target, raises(KeyboardInterrupt()))
    assert program.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


LISTS = [
    ("train --images a b --images c --lr-images d --lr_images e", {"images": ["a", "b", "c"], "lr_images": ["d", "e"]}),
    ("train --model a=1 --model b=2 --betas 0.5 --betas 0.9", {"model": ["a=1", "b=2"], "betas": ["0.5", "0.9"]}),
    ("evaluate x --temperatures 0 --temperatures 1 2", {"temperatures": [0, 1, 2]}),
    ("evaluate x", {"temperatures": [0, 0.5, 0.8]}),
    ("bench --dtype a --dtype b --shapes c", {"dtype": ["a", "b"], "shapes": ["c"], "layout": ["NCHW", "channels-last"]}),
    ("bench --operators a --operators a b", {"operators": ["a", "a", "b"]}),
]


@pytest.mark.parametrize("line, expected", LISTS)
def test_lists_that_are_given_in_several_parts(line, expected):
    args = vars(build_parser().parse_args(line.split()))
    assert {name: args[name] for name in expected} == expected
    assert vars(build_parser().parse_args(line.split())) == args, "no default was changed"


def test_every_list_is_gathered():
    """Of all options with any number of values."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    options = [option for command in commands.choices.values() for option in command._actions if option.option_strings]
    lists = [option for option in options if option.nargs in ("+", "*")]
    assert len(lists) > 10 and all(isinstance(option, Gathered) for option in lists)


def test_warnings_are_one_line_and_only_in_a_command(doctor, capfd):
    before = warnings.formatwarning
    with warnings.catch_warnings(), capfd.disabled():
        doctor(lambda args: print(warnings.formatwarning("said", UserWarning, "file.py", 3, "code"), end="", file=said))
        said = io.StringIO()
        assert main(["doctor"]) == 0
    assert said.getvalue() == "ncsr-fast doctor: warning: said\n" and warnings.formatwarning is before


CLOSED = """\
import os, sys
from ncsr_fast.cli import doctor, main
if sys.argv[1] == "pipe":
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
if sys.argv[1] == "latin":
    sys.stdout.reconfigure(encoding="ascii")
doctor.run = lambda args: print("×")
sys.exit(main.main(["doctor"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pipe", "/dev/full", "latin"])
def test_output_that_cannot_be_written(tmp_path, target):
    """A reader that went away, a full disk, an encoding without a ×: no traceback, and not one at the end either."""
    program = Fork(CLOSED, target, folder=tmp_path, out=target if target == "/dev/full" else None)
    expected = {"pipe": (141, ""), "/dev/full": (1, "No space left on device; make room"), "latin": (0, "")}[target]
    assert program.wait() == expected[0], program.errors
    assert expected[1] in program.errors and program.errors.count("\n") == bool(expected[1])
    assert target != "latin" or program.out == "\\xd7\n"
