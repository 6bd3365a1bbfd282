"""The comparison of whole models: every arm computes the same, what does not is not timed, and the table has every row."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from operator_cases import marked
from support import tiny_model

from ncsr_fast.benchmarks import end_to_end, report

ARMS = [name for name in end_to_end.LADDER if not name.endswith("tf32")]


def measured(arms=ARMS, task=None, **changes) -> list[dict]:
    model = tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2))
    own = {name: end_to_end.Ours(model, end_to_end.LADDER[name]) for name in arms} | changes
    task = task or end_to_end.Task("train", 1, 4)
    return end_to_end.measure(task, model, own, "cpu", rounds=2, with_memory=True, tf32=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*blew up:RuntimeWarning")  # as samples of random weights may
@pytest.mark.parametrize("task", [end_to_end.Task("sample", 1, 4, n=2), end_to_end.Task("train", 2, 4, frozen_encoder=True)])
def test_every_arm_has_a_row(task):
    rows = [row | {"device": "this", "torch": "2", "conv_flops_per_s": 1e11} for row in measured(task=task)]
    assert [row["arm"] for row in rows] == ARMS
    for row in rows:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["peak_bytes"] > 0
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["+ hoisting"]["flops"] > by_arm["+ sub-pixel"]["flops"]
    assert set(by_arm["plain"]["errors"].values()) == {0.0}
    table = report.end_to_end_table(rows)
    assert all(f"| {name} |" in table for name in ARMS) and task.describe() in table


@pytest.mark.parametrize("what", ["images", "loss", "gradient"])
def test_an_arm_whose_results_differ_has_its_error_for_figures(what):
    class Wrong(end_to_end.Ours):
        def decode(self, latents, lr):
            return super().decode(latents, lr) * 1.001

        def loss_and_gradients(self, hr, lr, noise):
            return super().loss_and_gradients(hr, lr, noise) * (1.001 if what == "loss" else 1)

        def gradient(self):
            return super().gradient() * (1.1 if what == "gradient" else 1)

    wrong = Wrong(tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2)), end_to_end.EngineOptions())
    task = end_to_end.Task("sample", 1, 4, n=1) if what == "images" else None
    plain, row = measured(["plain"], task, wrong=wrong)
    assert row["error"].startswith(f"the {what} of 'wrong' is off by") and "median_s" not in row
    assert plain["median_s"] > 0 and "error" not in plain
    rows = [each | {"device": "this", "torch": "2", "conv_flops_per_s": 1e11} for each in (plain, row)]
    assert "| wrong | failed: the " in report.end_to_end_table(rows)


class Raising(end_to_end.Ours):
    """Raises at one of its methods, or at its n-th call."""

    def __init__(self, method: str, after: int = 0) -> None:
        super().__init__(tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2)), end_to_end.EngineOptions())
        self.calls, self.after, usual = 0, after, getattr(self, method)

        def call(*arguments, **options):
            self.calls += 1
            if self.calls > self.after:
                raise RuntimeError(f"{method} is broken\nsomewhere")
            return usual(*arguments, **options)

        setattr(self, method, call)


@marked("slow", lambda method: method not in ("gradient", "sample"))
@pytest.mark.parametrize(
    "method, n", [("loss_and_gradients", 0), ("gradient", 0), ("round_trip", 0), ("decode", 1), ("sample", 1)]
)
def test_an_arm_that_raises_has_its_error_for_figures(method, n):
    plain, row = measured(["plain"], end_to_end.Task("task", 1, 4, n=n), broken=Raising(method))
    assert row == {"task": "task", "what": row["what"], "arm": "broken", "error": f"RuntimeError: {method} is broken"}
    assert plain["median_s"] > 0 and "error" not in plain


def test_nothing_is_compared_with_a_reference_that_raises():
    rows = measured(["+ hoisting"], plain=Raising("gradient"))
    assert {row["arm"]: row["error"] for row in rows} == {
        "plain": "RuntimeError: gradient is broken",
        "+ hoisting": "there is nothing to compare with, as 'plain' failed",
    }


def test_arms_that_break_in_their_turn_say_so():
    rows = measured(["plain"], broken=Raising("loss_and_gradients", after=1))
    assert [row["error"] for row in rows] == ["while the arms took turns: RuntimeError: loss_and_gradients is broken"] * 2


@pytest.fixture
def command(monkeypatch, tmp_path):
    """main() of small tasks; returns what it was asked to measure."""
    asked = []

    def measure(task, model, arms, device, rounds, with_memory, tf32):
        asked.append(list(arms))
        failed = {"error": "torn"}
        return [{"task": task.name, "what": "work", "arm": name, **failed} for name in arms]

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # which main() sets for its process
    monkeypatch.setattr(end_to_end, "random_model", lambda device: None)
    monkeypatch.setattr(end_to_end, "Ours", lambda model, options, compiled=False: "ours")
    monkeypatch.setattr(end_to_end, "Captured", lambda model, options: "captured")
    monkeypatch.setattr(end_to_end, "convolution_rate", lambda device: 1.0)
    monkeypatch.setattr(end_to_end, "provenance", lambda device: {"device": device, "torch": "2"})
    monkeypatch.setattr(end_to_end, "__spec__", argparse.Namespace(name="end_to_end"))

    def call(*arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["end_to_end", "--out", str(tmp_path), *arguments])
        with pytest.raises(ValueError, match="arms failed\n  .*: torn"):
            end_to_end.main()
        return asked

    return call


def test_arms_are_those_asked_for(command):
    assert command("--device", "cuda", "--tasks", "sample", "--arms", "plain", "captured, bf16") == [
        ["plain", "captured, bf16"]
    ]


def test_captured_arms_are_there_on_a_gpu_alone(command):
    (on_a_gpu,) = command("--device", "cuda", "--tasks", "sample")
    assert set(on_a_gpu) == {*end_to_end.LADDER, *end_to_end.CAPTURED}
    on_a_cpu = command("--tasks", "sample")[-1]
    assert set(on_a_cpu) == set(ARMS)


def test_rows_that_failed_are_stored(command, tmp_path):
    command("--tasks", "sample", "train", "--arms", "plain")
    rows = json.loads((tmp_path / "end_to_end-cpu.json").read_text())
    assert [(row["task"], row["error"]) for row in rows] == [("sample", "torn"), ("train", "torn")]


@pytest.mark.parametrize(
    "arms, complaint", [(["plian"], "no arm 'plian'; there are"), (["captured, bf16"], "can be measured on cpu")]
)
def test_arms_that_there_are_not_are_refused(command, capsys, arms, complaint):
    with pytest.raises(SystemExit):
        command("--arms", *arms)
    assert complaint in capsys.readouterr().err
