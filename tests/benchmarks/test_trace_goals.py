"""Launches and bytes of passes in Triton, on fake CUDA tensors: the goals, the stored rows, and what the page says of them."""

from __future__ import annotations

import json

import pytest
import torch
from installation import CHECKOUT

from ncsr_fast import ops

trace = pytest.importorskip("ncsr_fast.benchmarks.trace")

RESULTS = CHECKOUT / "benchmarks" / "results"
STORED = {row["task"]: row for row in json.loads((RESULTS / "trace-triton.json").read_text())}
COMMAND = "python -m ncsr_fast.benchmarks.trace --backend triton --precisions bf16 --json"
# Launches and bytes, at most. The goals of a training step, and of ten samples of a DIV2K image; of small images, whose time
# is that of launches, the launches of the large ones.
GOALS = {"train-b18": (2000, 30e9), "sample-40x40-n10": (900, 110e9), "sample-div2k-n10": (900, 110e9)}


@pytest.mark.slow
@pytest.mark.skipif(not ops.backends("cuda")["triton"].available, reason="there are no Triton kernels to trace")
@pytest.mark.parametrize(
    "name", ["train-b18", "sample-div2k-n10", pytest.param("sample-40x40-n10", marks=pytest.mark.exhaustive)]
)
def test_passes_in_triton_keep_to_the_goals(name):
    """In bfloat16; counted now, and as in the stored row where that is of this version of PyTorch."""
    found = trace.row_of(next(task for task in trace.TASKS if task.name == name), "bf16", "triton")
    launches, most = GOALS[name]
    assert 0 < found["launches"] <= launches
    assert 0 < found["bytes"] <= most
    row = STORED[name]
    if row["torch"].split(".")[:2] == torch.__version__.split(".")[:2]:
        for what in ("launches", "bytes"):
            assert found[what] == row[what], f"{what} were {row[what]}, store {found[what]}: {COMMAND}"


def test_a_row_of_every_task_is_stored():
    assert list(STORED) == [task.name for task in trace.TASKS]
    assert {(row["precision"], row["backend"]) for row in STORED.values()} == {("bf16", "triton")}
    assert {row["command"] for row in STORED.values()} == {f"{COMMAND} FILE"}


def test_the_page_has_the_stored_numbers():
    page = (CHECKOUT / "docs" / "gpu.md").read_text()
    rows = json.loads((RESULTS / "trace.json").read_text())
    for row in [row for row in rows if row["precision"] == "bf16"] + list(STORED.values()):
        assert f" {row['launches']:,} | {row['bytes'] / 1e9:.1f} |" in page, row["task"]
