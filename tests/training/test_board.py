"""TensorBoard files of a run, read back."""

from __future__ import annotations

import sys

import pytest
import torch

from ncsr_fast.training.board import Board

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def points(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_scalars_and_images_are_read_back(tmp_path):
    board = Board(tmp_path)
    board.scalars(20, "flow", {"loss": 1.5, "validation/psnr@0": 24.0})
    board.image(20, "flow", "sample", torch.rand(3, 8, 12).masked_fill(torch.eye(8, 12).bool(), float("nan")))
    board.close()
    assert points(tmp_path / "flow", "flow/loss") == [(20, 1.5)]
    assert points(tmp_path / "flow", "flow/validation/psnr@0") == [(20, 24.0)]
    image = read(tmp_path / "flow").Images("flow/sample")[0]
    assert (image.step, image.height, image.width) == (20, 8, 12)


def test_a_resumed_run_has_no_point_twice(tmp_path):
    for first, last, value in ((1, 6, 1.0), (4, 8, 2.0)):  # stopped after step 6, resumed from a checkpoint of step 3
        board = Board(tmp_path)
        for step in range(first, last + 1):
            board.scalars(step, "flow", {"loss": value})
        board.close()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    assert points(tmp_path / "flow", "flow/loss") == expected


def test_a_stage_does_not_take_back_another(tmp_path):
    board = Board(tmp_path)
    board.scalars(100, "encoder", {"loss": 1.0})
    board.close()
    board = Board(tmp_path)
    board.scalars(1, "flow", {"loss": 2.0})
    board.close()
    assert points(tmp_path / "encoder", "encoder/loss") == [(100, 1.0)]
    assert points(tmp_path / "flow", "flow/loss") == [(1, 2.0)]


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'ncsr_fast\[train\]'"):
        Board(tmp_path)
