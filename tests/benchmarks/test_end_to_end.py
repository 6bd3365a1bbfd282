"""The comparison of whole models: every arm computes the same, what does not is not timed, and the table has every row."""

from __future__ import annotations

import pytest
import torch
from support import tiny_model

from ncsr_fast.benchmarks import end_to_end, report

ARMS = [name for name in end_to_end.LADDER if not name.endswith("tf32")]


def measured(arms=ARMS, task=None, **changes) -> list[dict]:
    model = tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2))
    own = {name: end_to_end.Ours(model, end_to_end.LADDER[name]) for name in arms} | changes
    task = task or end_to_end.Task("train", 1, 4)
    return end_to_end.measure(task, model, own, "cpu", rounds=2, with_memory=True, tf32=False)


@pytest.mark.slow
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
def test_nothing_is_timed_when_results_differ(what):
    class Wrong(end_to_end.Ours):
        def decode(self, latents, lr):
            return super().decode(latents, lr) * 1.001

        def loss_and_gradients(self, hr, lr, noise):
            return super().loss_and_gradients(hr, lr, noise) * (1.001 if what == "loss" else 1)

        def gradient(self):
            return super().gradient() * (1.1 if what == "gradient" else 1)

    wrong = Wrong(tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2)), end_to_end.EngineOptions())
    task = end_to_end.Task("sample", 1, 4, n=1) if what == "images" else None
    with pytest.raises(ValueError, match=f"the {what} of 'wrong' is off by"):
        measured(["plain"], task, wrong=wrong)
