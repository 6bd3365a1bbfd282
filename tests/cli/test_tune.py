"""`ncsr-fast tune`: its file, which is found from then on, and what it says without a GPU."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from ncsr_fast import tuning
from ncsr_fast.benchmarks import tune
from ncsr_fast.cli import doctor
from ncsr_fast.cli.main import main
from ncsr_fast.ops import backend as backends

GPU = tuning.Gpu("Acme A1", "9.9")


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU on which every backend takes half of the reference's time, with the tensors of a CPU."""

    def measured(case, functions, direction):
        return {name: 1.0 if name == "reference" else 0.5 for name in functions}

    table_of = functools.partial(tune.table_of, device="cpu", measured=measured)
    monkeypatch.setattr(tune, "table_of", lambda gpu, file, uses: table_of(gpu, file, uses=("quick",)))
    monkeypatch.setattr(tuning, "gpu", lambda: GPU)
    lacking = backends._not_covered
    monkeypatch.setattr(backends, "_missing", lambda name, *rest: "" if name == "reference" else lacking(name, *rest))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    backends.forget()
    yield
    backends.forget()


def chosen(kernel: str) -> str:
    return backends.covering_backend(kernel, "auto", SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32))


def test_the_users_table_is_written_and_found(gpu, tmp_path, capsys):
    assert chosen("flow_step") == "triton"
    assert main(["tune"]) == 0
    file = tmp_path / "ncsr_fast" / "gpus" / "acme-a1.json"
    out = capsys.readouterr().out
    assert out.endswith(f"written to {str(file)!r}\n") and "flow_step, float32: native, 2.0× the reference's speed" in out
    assert [(table.file, table.gpu) for table in tuning._tables()][0] == (file, "Acme A1")
    assert chosen("flow_step") in ("triton", "native")


def test_a_table_elsewhere_is_found_where_it_is_named(gpu, tmp_path, monkeypatch, capsys):
    file = tmp_path / "elsewhere" / "a.json"
    assert main(["tune", "--quick", "--out", str(file)]) == 0
    assert f"written to {str(file)!r}, which is read if NCSR_FAST_TUNING_TABLE names it" in capsys.readouterr().out
    assert file not in [table.file for table in tuning._tables()]
    monkeypatch.setenv(tuning.USERS, str(file))
    backends.forget()
    assert file == tuning._tables()[0].file


def test_the_packages_tables_are_not_replaced(gpu, tmp_path, monkeypatch, capsys):
    before = (tuning.PACKAGED / "default.json").read_text()
    file = tmp_path / "package" / "default.json"
    file.parent.mkdir()
    file.write_text(before)
    monkeypatch.setattr(tuning, "PACKAGED", file.parent)
    assert main(["tune", "--out", str(file)]) == 1
    assert file.read_text() == before and "would replace the package's table" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_the_work(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "table_of", None)
    assert main(["tune", "--out", str(tmp_path)]) == 1
    assert "is a folder; give the file to write" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "gpu", lambda: None)
    assert main(["tune"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("ncsr-fast tune: there is no GPU to measure: ")


def test_doctor_says_which_entry_chose(gpu, tmp_path, monkeypatch):
    """And where that is another backend for bfloat16, both."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "torch", SimpleNamespace(**vars(torch) | {"empty": empty}))
    choices = (
        tuning.Choice("flow_step", None, "triton", 2.5, {"kind": "measured", "date": "2026-01-02", "gpu": "Acme A1"}),
        tuning.Choice("conv3x3", "bfloat16", "triton", 1.2, {"kind": "predicted"}),
        tuning.Choice("conv3x3", "float32", "triton", 1.4, {"kind": "predicted"}),
    )
    file = tmp_path / "ncsr_fast" / "gpus" / "acme-a1.json"
    file.parent.mkdir(parents=True)
    file.write_text(tuning.text(tuning.Table(file, "Acme A1", "9.9", choices, ())))
    monkeypatch.setattr(backends, "_not_covered", lambda *_: "")
    monkeypatch.setattr(backends, "_missing", lambda *_: "")
    backends.forget()
    assert doctor._choice("flow_step") == (
        "float32 and bfloat16: triton; triton: measured at 2.5× the reference's speed, 2026-01-02 on Acme A1 (acme-a1.json); "
        "native: in use since before there were tables, never measured (default.json)"
    )
    slower = "predicted at {}× the reference's speed, never measured; 1.3× is required (acme-a1.json)"
    assert doctor._choice("conv3x3") == (
        f"float32: triton; triton: {slower.format(1.4)} | bfloat16: reference; triton: {slower.format(1.2)}"
    )
    assert doctor._choice("fold").endswith("reference; no table has an entry")
    monkeypatch.setenv(tuning.MODE, "strict")
    backends.forget()
    assert "an error (no table of Acme A1 says which backend runs 'fold'" in doctor._choice("fold")
    assert doctor._tables()["mode"] == "strict (NCSR_FAST_TUNING)"


def empty(*size: int, dtype: torch.dtype, device: str) -> SimpleNamespace:
    return SimpleNamespace(dtype=dtype, device=torch.device(device))
