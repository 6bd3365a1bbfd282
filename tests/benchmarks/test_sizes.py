"""Measurements against the size of the image: each in a process of its own, rows that are kept, and the tables made of them."""

from __future__ import annotations

import json
import sys
from unittest import mock

import pytest
from support import tiny_model

from ncsr_fast.benchmarks import pages, sizes
from ncsr_fast.benchmarks.arms import OURS, PUBLISHED


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["sizes", *arguments])
    monkeypatch.setattr(sizes, "__spec__", sizes.__spec__)
    sizes.main()


def test_cells():
    """The published program for the model it has, tiles where there is more than one."""
    found = sizes.cells(1024, published=True)
    assert len(set(found)) == len(found)
    assert {cell.model for cell in found if cell.arm == PUBLISHED} == {sizes.FULL}
    assert {cell.side for cell in found if cell.arm == sizes.TILED} == {1024}
    assert max(cell.side for cell in found) == 1024 and {cell.task for cell in found} == {"sample", "gradient"}
    assert not [cell for cell in sizes.cells(64, published=False) if cell.arm in (PUBLISHED, sizes.TILED)]


@pytest.mark.parametrize("task", ["sample", "gradient"])
def test_ours(monkeypatch, task):
    monkeypatch.setattr(sizes, "_ENOUGH", 0.0)
    row = sizes.measured(sizes.Cell(sizes.COMPACT, OURS, task, 64), None)
    assert row["seconds"] > 0 and row["peak_bytes"] >= 0 and ("further_s" in row) is (task == "sample")


def test_memory_is_what_a_call_takes(monkeypatch):
    """Beyond what the process has then, as the system counts it, whatever it had before."""
    monkeypatch.setattr(sizes, "_ENOUGH", 0.0)
    taken = 2**26
    earlier = bytearray(b"x") * (4 * taken)
    del earlier
    found = sizes._figures(lambda: bytearray(b"x") * taken)["peak_bytes"]
    assert 0.95 * taken < found < 1.2 * taken  # some pages were free


def test_memory_that_runs_out_is_a_row(monkeypatch):
    monkeypatch.setattr(sizes, "_ours", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert sizes.measured(sizes.Cell(sizes.COMPACT, OURS, "sample", 64), None) == {"error": "out of memory"}


def test_the_published_program(monkeypatch):
    """A further image is its whole pass again; a gradient is that of the latents alone."""
    monkeypatch.setattr(sizes, "_ENOUGH", 0.0)
    program = mock.Mock(holder=tiny_model())
    row = sizes._published(sizes.Cell(sizes.FULL, PUBLISHED, "sample", 128), program)
    assert [call.args[0].shape[3] for call in program.sample.call_args_list] == [16, 32, 32] and "further_s" in row
    row = sizes._published(sizes.Cell(sizes.FULL, PUBLISHED, "gradient", 128), program)
    latents, lr = program.decode_and_differentiate.call_args.args
    assert lr.shape == (1, 3, 32, 32) and [latent.shape[2] for latent in latents] == [64, 16]
    assert program.train_encoder.call_args.args == program.train_flow.call_args.args == (False,) and "further_s" not in row


def test_rows_are_kept_and_a_failure_is_told(monkeypatch, tmp_path, capsys):
    """What is not measured now stays in the file; memory that ran out is a result, a process that died is none."""
    outcomes = {"sample": {"seconds": 2.0, "further_s": 1.0, "peak_bytes": 2**20}, "gradient": {"error": "out of memory"}}
    monkeypatch.setattr(sizes, "in_a_process", lambda cell, *_: outcomes[cell.task])
    monkeypatch.setattr(sizes, "provenance", lambda device: {"date": "today"})
    run(monkeypatch, "--models", sizes.FULL, "--most", "64", "--out", str(tmp_path))
    run(monkeypatch, "--models", sizes.COMPACT, "--most", "64", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "sizes-cpu.json").read_text())
    assert [(row["model"], row["task"]) for row in rows] == [
        (model, task) for model in (sizes.FULL, sizes.COMPACT) for task in ("sample", "gradient")
    ]
    assert rows[0]["command"] == "python -m ncsr_fast.benchmarks.sizes --models ncsr-x4 --most 64"
    outcomes["gradient"] = {"error": "the process ended with status 1"}
    with pytest.raises(ValueError, match="1 of 2 measurements failed: the process ended with status 1"):
        run(monkeypatch, "--models", sizes.COMPACT, "--most", "64", "--out", str(tmp_path))


def test_tables(monkeypatch, tmp_path):
    where = {"device": "CPU", "threads": 2, "torch": "2", "date": "today"}
    cell = {"model": sizes.COMPACT, "side": 64}
    rows = [
        {**cell, "arm": OURS, "task": "sample", "seconds": 2.0, "further_s": 1.0, "peak_bytes": 3 * 2**20},
        {**cell, "arm": sizes.TILED, "task": "sample", "error": "out of memory"},
        {**cell, "arm": OURS, "task": "gradient", "seconds": 4.0, "peak_bytes": 5 * 2**20},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([row | where for row in rows]))
    monkeypatch.setattr(pages, "IMAGE_SIZES", tmp_path / "rows.json")
    head, _, line, *_ = pages.sizes().splitlines()
    cells = [[part.strip() for part in text.split("|")[1:-1]] for text in (head, line)]
    assert cells[0] == ["", *(f"{what}, {how}" for what in ("an image", "a further one") for how in ("whole", "in tiles")),
                        "gradient, whole"]  # fmt: skip
    assert cells[1] == ["64×64", "2 s, 3 MiB", "out of memory", "1 s", "out of memory", "4 s, 5 MiB"]


@pytest.mark.slow
def test_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the installed package is measured, not one that lies in the current folder
    row = sizes.in_a_process(sizes.Cell(sizes.COMPACT, OURS, "sample", 64), 1, None)
    assert row["seconds"] > 0 and row["peak_bytes"] > 0
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert sizes.in_a_process(sizes.Cell(sizes.COMPACT, OURS, "sample", 64), 1, None)["error"].endswith("status 1")
