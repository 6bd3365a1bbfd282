"""What a row says of where it was measured; and that it is the installed package that is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Fork
from installation import CHECKOUT

import ncsr_fast
from ncsr_fast.benchmarks import provenance, report
from ncsr_fast.cli.main import main


def test_the_processor_and_what_is_used_of_it():
    row = provenance.provenance("cpu")
    assert row["cpu"].startswith(row["device"]) and row["cpu"].count("?") in (0, 3)
    assert row["torch_instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert row["physical_cores"] is None or 1 <= row["physical_cores"] <= os.cpu_count()


def test_the_instruction_set_is_the_one_in_use(instruction_set):
    assert provenance.provenance("cpu")["instruction_set"] == instruction_set


def test_cores_are_counted_once(monkeypatch):
    threads = [{"physical id": str(thread // 4), "core id": str(thread % 2)} for thread in range(8)]
    monkeypatch.setattr(provenance, "_cpuinfo", lambda: threads)
    assert provenance._physical_cores() == 4
    monkeypatch.setattr(provenance, "_cpuinfo", lambda: [{"processor": "0"}])
    assert provenance._physical_cores() is None


def test_no_path_of_this_machine_is_in_a_command():
    paths = {Path("/data/ncsr"): "PATH", Path("/data/images"): "IMAGES", None: "PATH"}
    for given in (
        ["/data/images/", "--published", "/data/ncsr", "--arms", "published, accelerated", "--out", "/data/rows", "--bf16"],
        ["--out=/data/rows", "/data/images", "--published=/data/ncsr/", "--arms", "published, accelerated", "--bf16"],
    ):
        command = provenance.recorded_command("ncsr_fast.benchmarks.training", given, paths)
        assert command.startswith("python -m ncsr_fast.benchmarks.training IMAGES --published")
        assert command[-len("PATH --arms 'published, accelerated' --bf16") :] == "PATH --arms 'published, accelerated' --bf16"
        assert "/data" not in command and "--out" not in command


def test_a_tree_that_is_not_installed_is_not_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ncsr_fast, "__file__", str(tmp_path / "ncsr_fast" / "__init__.py"))
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    complaint = capsys.readouterr().err
    assert "is not the installed one, which is what benchmarks measure" in complaint and complaint.count("\n") == 1
    monkeypatch.setattr(provenance, "_distribution", lambda: None)
    with pytest.raises(ValueError, match="`make dev` or `pip install .` installs it"):
        provenance.provenance("cpu")


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.end_to_end", "benchmarks.training"])
def test_the_folder_of_a_checkout_is_refused(module):
    done = subprocess.run([sys.executable, "-m", module], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "`python -m ncsr_fast.benchmarks.end_to_end`" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["end_to_end", "training"])
def test_rows_go_to_the_working_directory(module, tmp_path):
    program = "import runpy, sys; runpy.run_module(f'ncsr_fast.benchmarks.{sys.argv.pop(1)}', run_name='__main__')"
    fork = Fork(program, module, "--help", folder=tmp_path)
    assert fork.wait() == 0, fork.errors
    assert f"usage: python -m ncsr_fast.benchmarks.{module}" in fork.out
    assert "folder of the JSON rows (default: .)" in fork.out


# rows that only tables of pages show are read by tests/benchmarks/test_pages.py
STORED = [
    path for path in (CHECKOUT / "benchmarks" / "results").rglob("*.json") if not path.name.startswith(("family", "sizes"))
]


@pytest.mark.parametrize("path", sorted(STORED), ids=lambda path: path.name)
def test_stored_rows_can_be_read(path):
    """Those of all times, and a new one beside them."""
    rows = json.loads(path.read_text())
    show = {"operators": report.table, "end_to_end": report.end_to_end_table, "training": report.training_table}
    show |= {"accelerate": report.end_to_end_table, "trace": report.trace_table}
    view = next(function for name, function in show.items() if path.name.startswith(name))
    new = [row | {"instruction_set": "avx2", "cpu": "a CPU"} for row in rows[:1]]
    assert rows[0].get("task", rows[0]["device"]) in view(rows + new)
