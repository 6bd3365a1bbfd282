"""The trainer's benchmark: every task gives rows, and what they say is what was done."""

from __future__ import annotations

import argparse

import pytest
from support import tiny_config

from ncsr_fast.benchmarks import report, training


@pytest.fixture
def args():
    return argparse.Namespace(published=None, device="cpu", batch=2, crop=32, rounds=2, warm_up=1, threads=1, bf16=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training.NCSRConfig, "preset", lambda name: tiny_config())
    monkeypatch.setattr(training, "_CROPS", 4)


@pytest.mark.slow
def test_steps_take_turns(args, photos, tmp_path):
    rows = list(training.steps(photos, tmp_path, args))
    assert [row["arm"] for row in rows] == ["ncsr_fast", "ncsr_fast, bf16"]
    for row in rows:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and 0 < row["data_share"] < 1
        assert row["images_per_s"] == pytest.approx(2 / row["median_s"], rel=1e-3)
    assert "| ncsr_fast, bf16 |" in report.training_table([row | {"device": "this"} for row in rows])


def test_loader_and_resume(args, photos, tmp_path):
    names = [row["arm"] for row in training.loader(photos, tmp_path, args)]
    assert names == ["ncsr_fast, without a cache", "ncsr_fast, from the cache"]
    (row,) = training.resume(photos, tmp_path, args)
    assert row["save_s"] > 0 and row["load_s"] > 0
    assert row["bytes"] == (tmp_path / "resume" / "checkpoints" / "flow-00000001.pt").stat().st_size
