"""Both stages on a tiny model: they learn, and say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import assert_same_weights, log_rows, tiny_settings

from ncsr_fast import NCSR, RRDB
from ncsr_fast.data import degrade, read_image, to_float
from ncsr_fast.files import CheckpointError
from ncsr_fast.training import TrainingOutOfMemory, TrainSettings, memory, train
from ncsr_fast.training.batch import Draws
from ncsr_fast.training.loop import StageLoop
from ncsr_fast.training.memory import StepMemory
from ncsr_fast.training.model import random_model
from ncsr_fast.training.stages import FlowObjective


@pytest.fixture
def settings(photos):
    return tiny_settings(photos)


def test_a_run(settings, photos, tmp_path):
    model = train(replace(settings, validation=str(photos)), tmp_path / "run")
    assert model.actnorm_initialized
    assert_same_weights(model, NCSR.from_pretrained(tmp_path / "run" / "model"))
    losses = [(row["stage"], row["step"]) for row in log_rows(tmp_path / "run") if "loss" in row]
    encoder = RRDB.from_pretrained(tmp_path / "run" / "encoder")
    assert torch.equal(encoder.conv_last.weight, model.encoder.conv_last.weight), "the flow leaves the HR end alone"
    assert losses == [("encoder", 2), ("encoder", 3), ("flow", 2), ("flow", 4), ("flow", 6)]
    validations = [row for row in log_rows(tmp_path / "run") if "validation" in row]
    assert [(row["stage"], row["step"]) for row in validations] == [("encoder", 3), ("flow", 3), ("flow", 6)]
    assert {row["images"] for row in validations} == {"validation"} and {row["to_8bit"] for row in validations} == {"round"}
    watched = {"psnr", "lr_psnr", "ssim", "nonfinite", "saturated"}
    expected = {"nll", "smallest_scale", "round_trip"} | {f"{name}@{t}" for name in watched for t in ("0", "0.8")}
    assert set(validations[-1]["validation"]) == expected
    grid = read_image(tmp_path / "run" / "samples" / "flow-00000006.png")
    assert grid.shape == (3, 64, 4 * 64), "LR, two temperatures and the original side by side"
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    steps = ["encoder-00000002.pt", "encoder-00000003.pt", "flow-00000002.pt", "flow-00000004.pt", "flow-00000006.pt"]
    assert names == steps
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.slow
def test_training_lowers_the_loss(settings, tmp_path):
    run = tmp_path / "run"
    rare = {"log_every": 10, "save_every": 100, "validate_every": 100, "validation_images": 1}
    train(replace(settings, encoder_steps=30, steps=40, lr=5e-3, encoder_lr=5e-3, **rare), run)
    logged = [row for row in log_rows(run) if "loss" in row]
    losses = {stage: [row["loss"] for row in logged if row["stage"] == stage] for stage in ("encoder", "flow")}
    assert losses["encoder"][-1] < 0.7 * losses["encoder"][0]
    assert losses["flow"][-1] < losses["flow"][0] - 0.5


@pytest.mark.slow
def test_the_encoder_is_frozen_for_the_first_half(settings, tmp_path):
    settings = replace(settings, encoder_steps=0, save_every=100, validate_every=100, validation_images=1)
    half = train(replace(settings, steps=3, unfreeze=1.0), tmp_path / "half")
    torch.manual_seed(settings.seed)
    fresh = NCSR(settings.model)
    assert all(torch.equal(a, b) for a, b in zip(half.encoder.parameters(), fresh.encoder.parameters()))
    whole = train(replace(settings, unfreeze=0.5), tmp_path / "whole")
    changed = {
        name.split(".")[0]
        for name, value in whole.encoder.state_dict().items()
        if not torch.equal(value, fresh.encoder.state_dict()[name])
    }
    assert {"conv_first", "body", "conv_body"} <= changed
    head = {f"conv_up.1.{leaf}" for leaf in ("weight", "bias")}
    assert all(torch.equal(whole.encoder.state_dict()[name], fresh.encoder.state_dict()[name]) for name in head)


@pytest.mark.parametrize(
    "changes",
    [{"noise_channels": 1}, {"noise_channels": 0, "noise_steps": ()}, {"noise_steps": (0, 0, 0)}],
    ids=["std", "no-condition", "without-layer"],
)
def test_the_variants_train(settings, tmp_path, changes):
    run = tmp_path / "run"
    config = replace(settings.model, **changes)
    model = train(replace(settings, model=config, encoder_steps=0, steps=1, validation_images=1), run)
    assert model.config == config


@pytest.mark.slow
def test_fine_tuning_starts_from_the_model_and_its_actnorms(settings, tmp_path):
    first = train(replace(settings, encoder_steps=0, steps=2), tmp_path / "first")
    settings = replace(settings, encoder_steps=0, validation_images=1, start_from=str(tmp_path / "first" / "model"))
    assert_same_weights(train(replace(settings, steps=0), tmp_path / "same"), first)
    tuned = train(replace(settings, steps=1, lr=1e-9, unfreeze=1.0), tmp_path / "tuned")
    for name, value in tuned.state_dict().items():
        assert torch.allclose(value.double(), first.state_dict()[name].double(), atol=1e-7), name


def test_l1_on_the_temperature_zero_sample(settings, tmp_path):
    """The weights times the mean NLL and mean |decode(0) - hr| are added, and both have a gradient."""
    run = tmp_path / "run"
    settings = replace(settings, max_std=0.0, nll_weight=0.5, l1_weight=3.0, flip=False, rotate=False)
    model = train(replace(settings, encoder_steps=0, steps=1), run)
    hr = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    draws = Draws.at_step(0, settings, torch.Generator())
    loss, nll, l1 = FlowObjective(model, settings)(hr, None, *draws)
    clean, lr = to_float(hr), to_float(degrade(hr, 4))
    likely = model.decode([lr.new_zeros(2, *shape) for shape in model.latent_shapes(8, 8)], lr)
    assert l1.item() == pytest.approx((likely - clean).abs().mean().item(), rel=1e-4)
    assert nll.item() == pytest.approx(model.nll(clean, lr).mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx((0.5 * nll + 3 * l1).item(), rel=1e-5)
    l1.backward()
    assert model.levels[0].split_bias.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["pth", pytest.param("directory", marks=pytest.mark.slow)])
def test_encoder_weights(settings, tmp_path, kind):
    torch.manual_seed(3)
    source = NCSR(settings.model)
    torch.save(source.published_state_dict(), tmp_path / "flow.pth")
    source.encoder.save_pretrained(tmp_path / "encoder")
    weights = str(tmp_path / {"pth": "flow.pth", "directory": "encoder"}[kind])
    settings = replace(settings, encoder_steps=0, steps=1, unfreeze=1.0, validation_images=1)
    model = train(replace(settings, encoder_weights=weights), tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), source.encoder.parameters()))
    other = replace(settings.model, blocks=3)
    with pytest.raises(CheckpointError, match=r"does not fit this encoder \(RRDB, ×4, 3 blocks of 4 channels\); 30 missing"):
        train(replace(settings, model=other, encoder_weights=weights), tmp_path / "other")


def test_hooks_of_the_model_run_in_its_training(settings, tmp_path, monkeypatch):
    """At each step, as for any module: the objective calls the model, and not one of its methods."""
    calls, original = [], random_model

    def hooked(settings):
        model = original(settings)
        model.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
        model.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
        return model

    monkeypatch.setattr("ncsr_fast.training.model.random_model", hooked)
    train(replace(settings, encoder_steps=0, steps=2, validate_every=9, validation_images=1), tmp_path / "run")
    assert calls == ["before", (2,)] * 2


def measured(settings, kind, phase, sizes) -> StepMemory:
    """Stands for the measurement of a step."""
    return StepMemory(1000, 500, sizes, tuple(100 * size for size in sizes))


@pytest.mark.parametrize(
    "error, measure",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), measured),
        pytest.param(MemoryError(), memory._step, marks=pytest.mark.slow),
    ],
    ids=["GPU", "CPU"],
)
def test_out_of_memory_says_what_would_fit(settings, tmp_path, monkeypatch, error, measure):
    run = tmp_path / "run"

    def advance(self, *arguments):
        raise error

    settings = replace(settings, encoder_steps=0, unfreeze=0.0)
    monkeypatch.setattr(memory, "_step", measure)
    monkeypatch.setattr(StageLoop, "advance", advance)
    with pytest.raises(TrainingOutOfMemory, match=r"out of memory: .*\n.*By estimate, 2 crops of 32×32") as caught:
        train(settings, run)
    assert caught.value.__cause__ is error


def test_another_error_is_not_taken_for_it(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def advance(self, *arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(StageLoop, "advance", advance)
    with pytest.raises(RuntimeError, match="something else"):
        train(settings, run)


@pytest.mark.slow
def test_tensorboard(settings, tmp_path):
    run = tmp_path / "run"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(settings, tensorboard=True, encoder_steps=0, validation_images=1), run)
    board = EventAccumulator(str(run / "tensorboard" / "flow"))
    board.Reload()
    assert [point.step for point in board.Scalars("flow/nll")] == [2, 4, 6]
    assert [point.step for point in board.Scalars("flow/validation/psnr@0.8")] == [3, 6]
    assert [picture.step for picture in board.Images("flow/samples")] == [3, 6]


def test_learning_rate_schedule(settings):
    """Milestones are fractions below 1, else steps."""
    at = replace(settings, milestones=(10, 0.75), gamma=0.1)
    assert [at.learning_rate(1.0, step, 20) for step in (9, 10, 14, 15)] == pytest.approx([1, 0.1, 0.1, 0.01])
    rates = [settings.learning_rate(1.0, step, 20) for step in range(20)]
    assert (
        rates[:10] == [1.0] * 10 and rates[10:15] == [0.5] * 5 and rates[15:18] == [0.25] * 3 and rates[18:] == [0.125, 0.0625]
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"steps": -1}, "steps must be 0 or more"),
        ({"images": ()}, "images must name at least one"),
        ({"lr_images": ("a", "b")}, "lr_images must name one place for each of the 1"),
        ({"lr_images": ("a",), "degradation": "mine:blur"}, "give one of the two"),
        ({"precision": "fp16"}, "precision must be one of fp32, tf32, bf16"),
        ({"backoff": 2.0}, "backoff must be at most 1"),
        ({"lr": float("inf")}, "lr must be positive and finite, not inf"),
        ({"max_std": float("nan")}, "max_std must be 0 or more and finite, not nan"),
        ({"milestones": (0.5, float("nan"))}, "milestones must be finite"),
        ({"temperatures": (0.8, -0.1)}, r"temperatures must be 0 or more, not \(0.8, -0.1\)"),
        ({"validation_size": 7}, "validation_size must be at least 2·scale = 8, not 7"),
        ({"validation_lr": "lr"}, "validation_lr needs validation, the folder of the HR images"),
        ({"images": ("a", "")}, "images must be a path, not an empty text"),
        ({"start_from": ""}, "start_from must be a path, not an empty text"),
        ({"crop": 30}, r"crop must be a positive multiple of 2·scale = 8, not 30"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ],
)
def test_bad_settings(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_paths_may_be_objects_and_begin_at_home(settings, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"images": Path("~/a"), "lr_images": ["~/b"], "validation": "~", "validation_lr": Path("c/~"), "start_from": "~/d"}
    found = replace(settings, **given, encoder_weights="~/e.pth").to_dict()
    assert found["images"] == ["/home/me/a"] and found["lr_images"] == ["/home/me/b"] and found["validation"] == "/home/me"
    assert found["validation_lr"] == "c/~" and found["start_from"] == "/home/me/d"
    assert found["encoder_weights"] == "/home/me/e.pth"
    assert replace(settings, images="~/a").images == ("/home/me/a",)


def test_settings_round_trip(settings):
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
