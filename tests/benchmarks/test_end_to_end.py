"""The comparison of whole models: every arm computes the same, what does not is not timed, and the table has every row."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from compat.standin import StandInNCSR
from operator_cases import marked
from support import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.benchmarks import arms, end_to_end, published, report
from ncsr_fast.benchmarks.gpu import session
from ncsr_fast.engine import EngineOptions
from ncsr_fast.engine.ablation import Ablation, ablation

ARMS = [name for name in arms.LADDER if not name.endswith("tf32")]
SAMPLES, DECODING = arms.Task("sample", 1, 4, n=2), arms.Task("decode", 1, 4, decode=True)


def small_model() -> NCSR:
    return tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2))


def measured(names=ARMS, task=None, model=None, **changes) -> list[dict]:
    model = small_model() if model is None else model
    own = {name: arms.Ours(model, *arms.LADDER[name]) for name in names} | changes
    task = task or arms.Task("train", 1, 4)
    return end_to_end.measure(task, model, own, "cpu", rounds=2, with_memory=True, tf32=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*blew up:RuntimeWarning")  # as samples of random weights may
@pytest.mark.parametrize(
    "task", [SAMPLES, arms.Task("train", 2, 4, frozen_encoder=True), pytest.param(DECODING, marks=pytest.mark.exhaustive)]
)
def test_every_arm_has_a_row(task):
    model, names = small_model(), [*ARMS, arms.CONDITIONED] if task.decode else ARMS
    others = {name: arms.Conditioned(model, EngineOptions()) for name in names if name not in ARMS}
    rows = [row | {"device": "this", "torch": "2", "conv_flops_per_s": 1e11} for row in measured(ARMS, task, model, **others)]
    assert [row["arm"] for row in rows] == names
    for row in rows:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["peak_bytes"] > 0
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["+ hoisting"]["flops"] > by_arm["+ sub-pixel"]["flops"]
    assert set(by_arm["plain"]["errors"].values()) == {0.0}
    table = report.end_to_end_table(rows)
    assert all(f"| {name} |" in table for name in names) and task.describe() in table


def test_conditioning_is_no_part_of_what_is_counted_of_a_flow_conditioned_once():
    model, lr = small_model(), torch.rand(1, 3, 4, 4)
    conditioned = {arms.CONDITIONED: arms.Conditioned(model, EngineOptions())}
    ours, once = measured([arms.OURS], DECODING, model, **conditioned)
    assert set(once["errors"]) == {"images", "gradient"}
    model.options = EngineOptions(backend="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.features(lr)
    assert 0 < once["flops"] < ours["flops"] - counter.get_total_flops()


def test_parts_of_the_engine_are_off_while_an_arm_is_at_work(monkeypatch):
    """Forward and backward, and afterwards they are on."""
    model, seen = small_model(), []

    def watch(where, name: str) -> None:
        usual = getattr(where, name)

        def watched(*arguments, **options):
            seen.append((model.options, ablation()))
            return usual(*arguments, **options)

        monkeypatch.setattr(where, name, watched)

    for where, name in (arms, "differentiated"), (arms, "backward"), (type(model), "features"):
        watch(where, name)
    for variant in (arms.LADDER["+ hoisting"], arms.LADDER["+ sub-pixel"]):
        for task in (SAMPLES, arms.Task("train", 1, 4), DECODING):
            arm = arms.Arm(arms.Ours(model, *variant), task, "cpu", arms.draw_latents(task, model, "cpu"))
            for act in (arm.prepare, arm.run, arm.results, lambda arm=arm: arm.model.round_trip(arm)):
                act()
                assert ablation() == Ablation()
            assert set(seen) == {variant}
            assert len(seen) == (4 if task.n else 6)  # two passes, twice as many with gradients, and a round trip
            seen.clear()


def test_each_rung_of_the_ladder_is_another():
    assert len(set(arms.LADDER.values())) == len(arms.LADDER)


def test_decoding_records_gradients_of_latents_alone():
    """Whatever the task before recorded; and training records all of them again."""
    model = small_model()
    arm = arms.Arm(arms.Ours(model, EngineOptions()), DECODING, "cpu", arms.draw_latents(DECODING, model, "cpu"))
    arm.prepare()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found = arm.results()["gradient"]
    leaves = [latent.requires_grad_() for latent in arm.latents]
    expected = torch.autograd.grad(model.decode(leaves, arm.lr).square().mean(), leaves)
    assert torch.equal(found, torch.cat([gradient.flatten() for gradient in expected]))
    arms.Arm(arm.model, arms.Task("train", 1, 4), "cpu", []).prepare()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert trained == [parameter.requires_grad for parameter in small_model().parameters()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*blew up:RuntimeWarning")  # as samples of random weights may
def test_the_published_program_does_every_task(monkeypatch):
    """A stand-in of it, as it is and accelerated."""
    options = session.Session(session.Setup(Path(), dry=True), "item", 0.0).sizes.options
    module = types.ModuleType("models.modules.NCSRNet_arch")
    module.NCSRNet = lambda in_nc, out_nc, nf, nb, gc, scale, K, opt: StandInNCSR(
        opt | {"network_G": opt["network_G"] | {"nf": nf, "gc": gc, "nb": nb}}
    )
    for name in ("models", "models.modules", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(published, "_importable", lambda checkout: None)
    model = arms.random_model("cpu", NCSRConfig.from_published(options))
    programs = {
        name: published.PublishedNCSR(Path(), model.published_state_dict(), "cpu", name == arms.ACCELERATED, options)
        for name in (arms.PUBLISHED, arms.ACCELERATED)
    }
    for task in (DECODING, SAMPLES, arms.Task("train", 1, 4)):
        rows = measured(["plain"], task, model, **programs)
        assert [row.get("error") for row in rows] == [None] * 3
        weights = list(programs[arms.PUBLISHED].parameters())
        assert any(weight.requires_grad for weight in weights) != task.decode


@pytest.mark.parametrize("what", ["images", "loss", "gradient"])
@pytest.mark.slow
def test_an_arm_whose_results_differ_has_its_error_for_figures(what):
    class Wrong(arms.Ours):
        def decode(self, latents, lr):
            return super().decode(latents, lr) * 1.001

        def loss_and_gradients(self, hr, lr, noise):
            return super().loss_and_gradients(hr, lr, noise) * (1.001 if what == "loss" else 1)

        def gradient(self):
            return super().gradient() * (1.1 if what == "gradient" else 1)

    wrong = Wrong(small_model(), EngineOptions())
    task = arms.Task("sample", 1, 4, n=1) if what == "images" else None
    plain, row = measured(["plain"], task, wrong=wrong)
    assert row["error"].startswith(f"the {what} of 'wrong' is off by") and "median_s" not in row
    assert plain["median_s"] > 0 and "error" not in plain
    rows = [each | {"device": "this", "torch": "2", "conv_flops_per_s": 1e11} for each in (plain, row)]
    assert "| wrong | failed: the " in report.end_to_end_table(rows)


class Raising(arms.Ours):
    """Raises at one of its methods, or at its n-th call."""

    def __init__(self, method: str, after: int = 0) -> None:
        super().__init__(small_model(), EngineOptions())
        self.calls, self.after, usual = 0, after, getattr(self, method)

        def call(*arguments, **options):
            self.calls += 1
            if self.calls > self.after:
                raise RuntimeError(f"{method} is broken\nsomewhere")
            return usual(*arguments, **options)

        setattr(self, method, call)


@marked("slow", lambda method: method not in ("gradient", "sample"))
@pytest.mark.parametrize(
    "method, n",
    [
        ("loss_and_gradients", 0),
        ("gradient", 0),
        ("round_trip", 0),
        ("decode", 1),
        ("sample", 1),
        ("decode_and_differentiate", 0),
    ],
)
def test_an_arm_that_raises_has_its_error_for_figures(method, n):
    task = arms.Task("task", 1, 4, n=n, decode=method == "decode_and_differentiate")
    plain, row = measured(["plain"], task, broken=Raising(method))
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
        asked.append((task.name, list(arms)))
        failed = {"error": "torn"}
        return [{"task": task.name, "what": "work", "arm": name, **failed} for name in arms]

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # which main() sets for its process
    monkeypatch.setattr(end_to_end, "random_model", lambda device: None)
    monkeypatch.setattr(end_to_end, "Ours", lambda model, options, ablation, compiled=False: "ours")
    for name in ("Captured", "Conditioned"):
        monkeypatch.setattr(end_to_end, name, lambda model, options, name=name: name)
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
        ("sample", ["plain", "captured, bf16"])
    ]


def test_captured_arms_are_there_on_a_gpu_alone(command):
    ((_, on_a_gpu),) = command("--device", "cuda", "--tasks", "sample")
    assert set(on_a_gpu) == {*arms.LADDER, *arms.CAPTURED}
    _, on_a_cpu = command("--tasks", "sample")[-1]
    assert set(on_a_cpu) == set(ARMS)


def test_an_arm_does_the_tasks_that_it_has_a_way_of_its_own_for(command):
    (_, found) = command("--device", "cuda", "--tasks", "decode-gradient")[-1]
    assert set(found) == {*arms.LADDER, arms.CONDITIONED}
    asked = command("--tasks", "sample", "decode-gradient", "--arms", arms.CONDITIONED)[1:]
    assert asked == [("decode-gradient", [arms.CONDITIONED])], "and is left out of the others"


def test_rows_that_failed_are_stored(command, tmp_path):
    command("--tasks", "sample", "train", "--arms", "plain")
    rows = json.loads((tmp_path / "end_to_end-cpu.json").read_text())
    assert [(row["task"], row["error"]) for row in rows] == [("sample", "torn"), ("train", "torn")]


@pytest.mark.parametrize(
    "names, complaint", [(["plian"], "no arm 'plian'; there are"), (["captured, bf16"], "can be measured on cpu")]
)
def test_arms_that_there_are_not_are_refused(command, capsys, names, complaint):
    with pytest.raises(SystemExit):
        command("--arms", *names)
    assert complaint in capsys.readouterr().err
