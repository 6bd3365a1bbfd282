"""`ncsr-fast doctor`: what it shows, and what it advises."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch

from ncsr_fast.cli import doctor
from ncsr_fast.cli.main import main
from ncsr_fast.ops.backend import _native_mend, _triton_missing


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in (
        "python",
        torch.__version__,
        "pydantic",
        "tensorboard",
        "onnxruntime",
        "huggingface-hub",
        "C++ compiler",
        "actnorm_invconv",
        "native",
        "triton",
        "available: ",
    ):
        assert text in out


def test_doctor_says_where_tools_cannot_be_run(tmp_path, monkeypatch):
    program = tmp_path / "nvcc"
    program.write_text("no program")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = doctor.report()["machine"]
    assert "nvcc cannot be run: [Errno 8] Exec format error" in machine["nvcc"]
    assert machine["C++ compiler"] == "none (c++ or g++ or clang++ not found)"


TREE = "this is a source tree that was not installed; run there: pip install -e ."


@pytest.mark.parametrize(
    "files, advice",
    [
        ({}, TREE),
        (
            {"build_info.txt": "skipped: no compiler\n"},
            "skipped: no compiler; with a C++ compiler (g++ or clang++), in",
        ),
        ({"_native.cpython-27-x.so": ""}, "_native.cpython-27-x.so was built for another Python; install the package again: "),
        (
            {f"_native{EXTENSION_SUFFIXES[0]}": ""},
            "it was built for another machine; install the package again on this machine",
        ),
    ],
    ids=["tree", "no-compiler", "another-python", "another-machine"],
)
def test_advice_on_the_compiled_module(tmp_path, files, advice):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _native_mend(tmp_path).startswith(advice)


@pytest.mark.parametrize(
    "error, advice",
    [
        (ModuleNotFoundError("No module named 'ncsr_fast.kernels'", name="ncsr_fast.kernels"), TREE),
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "pip install 'ncsr_fast[triton]'"),
        (ImportError("cannot import name 'jit'", name="triton"), "another version is needed: pip install --upgrade"),
    ],
    ids=["tree", "absent", "old"],
)
def test_advice_on_triton(error, advice, monkeypatch):
    def fail(backend):
        raise error

    monkeypatch.setattr(sys.modules[_triton_missing.__module__], "kernels", fail)
    monkeypatch.setattr(sys, "platform", "linux")
    assert f"cannot be imported ({error}): {advice}" in _triton_missing("cuda")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert ("there is no Triton for this system" in _triton_missing("cuda")) == (advice.startswith("pip"))


def test_doctor_says_how_the_package_is_installed(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError

    assert doctor._installation().startswith(("editable", "installed"))
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert doctor._installation() in TREE
