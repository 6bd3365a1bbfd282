"""Both stages on a tiny model: they learn, resume bit for bit, and say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support import tiny_config

from ncsr_fast import NCSR, RRDB
from ncsr_fast.data import read_image
from ncsr_fast.files import CheckpointError
from ncsr_fast.training import TrainingDiverged, TrainSettings, train
from ncsr_fast.training.stages import FlowStage


@pytest.fixture
def settings(photos):
    return TrainSettings(
        config=tiny_config(), images=str(photos), crop=32, batch=2, encoder_steps=3, steps=6, encoder_lr=1e-3, lr=1e-3,
        log_every=2, save_every=2, validate_every=3, seed=7,
    )  # fmt: skip


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(first: NCSR, second: NCSR) -> None:
    """Bit for bit."""
    other = second.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_a_run(settings, photos, tmp_path):
    model = train(replace(settings, validation=str(photos)), tmp_path / "run")
    assert model.actnorm_initialized
    assert_same(model, NCSR.from_pretrained(tmp_path / "run" / "model"))
    losses = [(row["stage"], row["step"]) for row in rows(tmp_path / "run") if "loss" in row]
    encoder = RRDB.from_pretrained(tmp_path / "run" / "encoder")
    assert torch.equal(encoder.conv_last.weight, model.encoder.conv_last.weight), "the flow leaves the HR end alone"
    assert losses == [("encoder", 2), ("encoder", 3), ("flow", 2), ("flow", 4), ("flow", 6)]
    validations = [row for row in rows(tmp_path / "run") if "validation" in row]
    assert [(row["stage"], row["step"]) for row in validations] == [("encoder", 3), ("flow", 3), ("flow", 6)]
    assert {row["images"] for row in validations} == {"validation"}
    assert set(validations[-1]["validation"]) == {"nll", "psnr@0", "lr_psnr@0", "psnr@0.8", "lr_psnr@0.8"}
    grid = read_image(tmp_path / "run" / "samples" / "flow-00000006.png")
    assert grid.shape == (3, 96, 4 * 120), "LR, two temperatures and the original side by side"
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["encoder-00000002.pt", "encoder-00000003.pt", "flow-00000004.pt", "flow-00000006.pt"]


def test_training_lowers_the_loss(settings, tmp_path):
    train(replace(settings, encoder_steps=30, steps=40, lr=5e-3, encoder_lr=5e-3, log_every=10), tmp_path)
    logged = [row for row in rows(tmp_path) if "loss" in row]
    losses = {stage: [row["loss"] for row in logged if row["stage"] == stage] for stage in ("encoder", "flow")}
    assert losses["encoder"][-1] < 0.7 * losses["encoder"][0]
    assert losses["flow"][-1] < losses["flow"][0] - 0.5


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stage, at", [("encoder", 2), ("flow", 0), ("flow", 3), ("flow", 5)])
def test_a_stopped_run_resumes_bit_for_bit(settings, tmp_path, monkeypatch, stage, at):
    """Stopped between checkpoints: the steps since the last one are done again, and come out the same."""
    whole = train(settings, tmp_path / "whole")
    from ncsr_fast.training import stages

    cls = {"encoder": stages.EncoderStage, "flow": stages.FlowStage}[stage]
    original = cls.loss

    def stop(self, hr, lr, step, generator):
        if step == at:
            raise Stopped
        return original(self, hr, lr, step, generator)

    monkeypatch.setattr(cls, "loss", stop)
    with pytest.raises(Stopped):
        train(settings, tmp_path / "stopped")
    monkeypatch.setattr(cls, "loss", original)
    torch.manual_seed(99)  # whatever the process did before
    assert_same(train(settings, tmp_path / "stopped"), whole)
    strip = lambda log: [{key: value for key, value in row.items() if key != "steps_per_s"} for row in log]  # noqa: E731
    assert strip(rows(tmp_path / "stopped")) == strip(rows(tmp_path / "whole"))


def test_a_damaged_checkpoint_is_passed_over(settings, tmp_path, capsys):
    whole = train(settings, tmp_path)
    newest = tmp_path / "checkpoints" / "flow-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="flow-00000006.pt' is damaged and is not used"):
        again = train(settings, tmp_path)
    assert_same(again, whole)
    for path in (tmp_path / "checkpoints").glob("flow-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of stage 'flow' in"), pytest.warns(UserWarning):
        train(settings, tmp_path)


def test_the_encoder_is_frozen_for_the_first_half(settings, tmp_path):
    settings = replace(settings, encoder_steps=0)
    half = train(replace(settings, steps=3, unfreeze=1.0), tmp_path / "half")
    torch.manual_seed(settings.seed)
    fresh = NCSR(settings.config)
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
    config = replace(settings.config, **changes)
    model = train(replace(settings, config=config, encoder_steps=0, steps=2), tmp_path)
    assert model.config == config


def test_fine_tuning_starts_from_the_model_and_its_actnorms(settings, tmp_path):
    first = train(replace(settings, encoder_steps=0, steps=2), tmp_path / "first")
    settings = replace(settings, encoder_steps=0, start_from=str(tmp_path / "first" / "model"))
    assert_same(train(replace(settings, steps=0), tmp_path / "same"), first)
    tuned = train(replace(settings, steps=1, lr=1e-9, unfreeze=1.0), tmp_path / "tuned")
    for name, value in tuned.state_dict().items():
        assert torch.allclose(value.double(), first.state_dict()[name].double(), atol=1e-7), name


def test_l1_on_the_temperature_zero_sample(settings, tmp_path):
    """The weight times mean |decode(0) - hr| is added to the loss, and has a gradient."""
    model = train(replace(settings, encoder_steps=0, steps=1), tmp_path)
    hr, lr = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 4, 4)
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    stages = [FlowStage(model, replace(settings, max_std=0.0, l1_weight=weight)) for weight in (0.0, 3.0)]
    plain, both = (stage.loss(hr, lr, 0, draw()) for stage in stages)
    likely = model.decode([lr.new_zeros(2, *shape) for shape in model.latent_shapes(4, 4)], lr)
    assert (both - plain).item() == pytest.approx(3 * (likely - hr).abs().mean().item(), rel=1e-4)
    (both - plain).backward()
    assert model.levels[0].split_bias.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["pth", "directory"])
def test_encoder_weights(settings, tmp_path, kind):
    torch.manual_seed(3)
    source = NCSR(settings.config)
    torch.save(source.published_state_dict(), tmp_path / "flow.pth")
    source.encoder.save_pretrained(tmp_path / "encoder")
    weights = str(tmp_path / {"pth": "flow.pth", "directory": "encoder"}[kind])
    settings = replace(settings, encoder_steps=0, steps=1, unfreeze=1.0)
    model = train(replace(settings, encoder_weights=weights), tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), source.encoder.parameters()))
    other = replace(settings.config, blocks=3)
    with pytest.raises(CheckpointError, match=r"not that of this encoder \(RRDB, ×4, 3 blocks of 4 channels\); 30 missing"):
        train(replace(settings, config=other, encoder_weights=weights), tmp_path / "other")


def test_another_run_in_the_folder_is_refused(settings, tmp_path):
    train(replace(settings, encoder_steps=0, steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"a run with other settings: lr \(was 0.001, now 0.01\); choose another folder"):
        train(replace(settings, encoder_steps=0, steps=1, lr=0.01), tmp_path)


def test_divergence_stops_with_a_message_and_keeps_the_checkpoint(settings, tmp_path, monkeypatch):
    original = FlowStage.loss
    monkeypatch.setattr(
        FlowStage, "loss", lambda self, hr, lr, step, g: original(self, hr, lr, step, g) * (float("nan") if step == 4 else 1)
    )
    with pytest.raises(TrainingDiverged, match="stage 'flow': the loss .nan.*of step 4 is not finite"):
        train(settings, tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "flow-00000004.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_learning_rate_schedule(settings):
    rates = [settings.learning_rate(1.0, step, 20) for step in range(20)]
    assert (
        rates[:10] == [1.0] * 10 and rates[10:15] == [0.5] * 5 and rates[15:18] == [0.25] * 3 and rates[18:] == [0.125, 0.0625]
    )


@pytest.mark.parametrize(
    "changes, message",
    [({"batch": 0}, "batch must be at least 1"), ({"lr": 0.0}, "lr must be positive"), ({"steps": -1}, "steps must not")],
)
def test_bad_settings(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_settings_round_trip(settings):
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
