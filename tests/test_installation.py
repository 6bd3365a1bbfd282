"""The tests refuse to run on a package that is not installed, or that lacks a backend, instead of testing less."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import installation
import pytest

import ncsr_fast
from ncsr_fast import ops


@pytest.mark.slow
def test_a_tree_that_is_not_installed_is_refused(tmp_path):
    """`python -m pytest` there puts the tree before what is installed."""
    shutil.copytree(Path(ncsr_fast.__file__).parent, tmp_path / "ncsr_fast", ignore=shutil.ignore_patterns("*.so", "models"))
    (tmp_path / "tests").mkdir()
    for path in ("pyproject.toml", "tests/conftest.py", "tests/installation.py"):
        shutil.copy(installation.CHECKOUT / path, tmp_path / path)
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert "`make dev`" in done.stderr and "Traceback" not in done.stderr and "passed" not in done.stdout


def test_nothing_installed_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(installation.Incomplete, match="ncsr_fast is not installed: `make dev`"):
        installation.check()


def test_a_compiled_module_that_is_older_than_its_source_is_refused(tmp_path):
    module = tmp_path / f"_native.{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    module.touch()
    installation._check_compiled(tmp_path)
    os.utime(module, (0, 0))
    with pytest.raises(installation.Incomplete, match=r"csrc/core/arithmetic.h has changed since _native.*: run `make dev`"):
        installation._check_compiled(tmp_path)


@pytest.mark.parametrize("backend", [cell[1] for cell in installation.cells() if cell[0] == "cpu"])
def test_a_missing_backend_is_named(monkeypatch, backend):
    def backends(device: str) -> dict[str, ops.Backend]:
        return {n: ops.Backend(n, (device, n) != ("cpu", backend), "it was left out") for n in installation.BACKENDS}

    monkeypatch.setattr(ops, "backends", backends)
    monkeypatch.delenv(installation.VARIABLE, raising=False)
    with pytest.raises(installation.Incomplete, match=f"'{backend}' is missing on the cpu device: it was left out") as caught:
        installation.check()
    remedy = str(caught.value).split(f"{installation.VARIABLE}=")[1].split()[0]
    monkeypatch.setenv(installation.VARIABLE, remedy)
    installation.check()
    assert ("cpu", backend) not in installation.cells()


def test_cells_are_chosen_by_backend_and_by_device(monkeypatch):
    monkeypatch.setenv(installation.VARIABLE, "reference, cpu-native")
    assert [cell for cell in installation.cells() if cell[0] == "cpu"] == [("cpu", "reference"), ("cpu", "native")]
    monkeypatch.setenv(installation.VARIABLE, "natvie")
    with pytest.raises(installation.Incomplete, match="NCSR_FAST_CELLS='natvie': natvie: expected some of reference, native"):
        installation.cells()
