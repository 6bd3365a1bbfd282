"""A step that is not finite changes nothing, is counted and explained, and too many of them end the run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import assert_same_weights, image, log_rows, tiny_model, tiny_settings

from ncsr_fast import NCSR, graphs
from ncsr_fast.training import TrainingDiverged, train
from ncsr_fast.training.batch import Draws, prepare
from ncsr_fast.training.diagnose import first_nonfinite
from ncsr_fast.training.stages import FlowObjective

NAN = float("nan")


@pytest.fixture
def settings(photos):
    return tiny_settings(photos, encoder_steps=0, validate_every=100, validation_images=1, validation_size=32)


def spoil(monkeypatch, *steps: int) -> None:
    """Make the loss, and with it every gradient, of these training steps NaN; not where one is looked at afterwards."""
    step, forward, count = graphs.TrainingStep.__call__, FlowObjective.forward, []

    def call(self, *inputs):
        count.append(None)
        with pytest.MonkeyPatch.context() as patch:
            if len(count) in steps:
                patch.setattr(FlowObjective, "forward", lambda objective, *inputs: forward(objective, *inputs) * NAN)
            return step(self, *inputs)

    monkeypatch.setattr(graphs.TrainingStep, "__call__", call)


def stop_at(step: int):
    """In place of the look at skipped steps: the end of the process at this one."""

    def check(loop, number: int) -> None:
        if number + 1 == step:
            raise KeyboardInterrupt

    return check


def state(model: NCSR, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *moments)]


def test_a_skipped_step_changes_nothing_but_the_count():
    model = tiny_model(dtype=torch.float32)
    optimizer = graphs.adam(model, 1e-2)
    step = graphs.TrainingStep(model, optimizer, max_grad_norm=10.0, graph=False, backoff=0.5)
    good = image(2, 3, 16, 16, dtype=torch.float32), image(2, 3, 4, 4, dtype=torch.float32)
    step(*good)
    before = state(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncsr_fast.checks.reading_is_free", lambda tensor: False)  # as on a GPU, where input is not looked at
        for _ in range(2):
            step(good[0] * NAN, good[1])
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))
    assert step.counters.tolist() == [3, 2, 2, 2] and step.rate == 0.25
    step(*good)
    assert step.counters.tolist() == [4, 2, 0, 2] and step.rate == 0.25
    assert not torch.equal(before[1], state(model, optimizer)[1])


def test_a_gradient_alone_is_enough():
    """The loss may be finite where its gradient is not."""
    model = tiny_model(dtype=torch.float32)
    step = graphs.TrainingStep(
        model, graphs.adam(model, 1e-2), graph=False, loss=lambda m: m.levels[0].actnorm_bias[0, 0].mul(0).abs().sqrt()
    )
    loss, norm = step()
    assert loss == 0 and not norm.isfinite() and step.counters[1] == 1
    assert model.levels[0].actnorm_bias.isfinite().all()


def test_an_optimizer_that_cannot_skip_is_refused():
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="must be fused.*graphs.adam"):
        graphs.TrainingStep(model, torch.optim.Adam(model.parameters()), graph=False)


def test_a_run_skips_logs_and_goes_on(settings, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    spoil(monkeypatch, 3, 4)
    model = train(replace(settings, backoff=0.5), run, "cpu")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    events = [row for row in log_rows(run) if row.get("event") == "skipped"]
    assert [(row["step"], row["count"]) for row in events] == [(3, 1), (4, 1)]
    assert "step 4: the loss or its gradient is not finite, first in nothing" in capsys.readouterr().out  # gone when looked at
    losses = [row for row in log_rows(run) if "grad_norm" in row]
    assert [row["skipped"] for row in losses] == [0, 2, 2]
    assert "loss" not in losses[1] and losses[2]["loss"] is not None, "the mean is of the steps that were done"
    assert losses[2]["lr"] == pytest.approx(losses[0]["lr"] * 0.25 * 0.25), "backoff twice, and two milestones"


def test_too_many_in_a_row_end_the_run_with_its_checkpoints_kept(settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    spoil(monkeypatch, 1, 3, 4, 5)
    with pytest.raises(TrainingDiverged, match=r"step 5: .*\(3 in a row, 4 in all\).*Try a lower learning rate"):
        train(replace(settings, max_skipped=3), run, "cpu")
    saved = torch.load(run / "checkpoints" / "flow-00000004.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert saved["counters"].tolist() == [4, 3, 2, 3]


@pytest.mark.slow
def test_the_count_and_the_rate_survive_a_stop(settings, tmp_path):
    settings = replace(settings, backoff=0.5)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2)
        whole = train(settings, tmp_path / "whole", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 2)
        patch.setattr("ncsr_fast.training.loop.StageLoop._check_skipped", stop_at(5))
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "stopped", "cpu")
    assert_same_weights(train(settings, tmp_path / "stopped", "cpu"), whole)
    assert [row["skipped"] for row in log_rows(tmp_path / "stopped") if "grad_norm" in row] == [1, 1, 1]


@pytest.fixture
def step():
    """A model with two steps a level, its objective, and a batch."""
    model = tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 1, 2))
    settings = tiny_settings("unused", model=model.config)
    inputs = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), None, *Draws.at_step(0, settings, torch.Generator())
    hr, lr, *draws = inputs
    batch = prepare(hr, lr, Draws(*draws), settings)
    return model, FlowObjective(model, settings), inputs, batch


def test_nothing_is_found_where_all_is_finite(step):
    model, objective, inputs, batch = step
    assert first_nonfinite(model, objective, inputs, batch) is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, place, value, where",
    [
        ("levels.1.couplings.conv1", (1, 0), NAN, "weight couplings.conv1 of level 2, step 1"),
        ("levels.2.noise_couplings.bias3", (0, 0), NAN, "weight noise_couplings.bias3 of level 3, step 0"),
        ("levels.1.noise_couplings.bias3", (0, 0), NAN, "weight noise_couplings.bias3 of level 2, step 1"),
        ("levels.0.split_bias", (0,), NAN, "weight levels.0.split_bias"),
        ("levels.1.actnorm_logs", (2, 0), 200.0, "level 2, step 1: state after the actnorm and 1×1 convolution"),
        ("levels.0.actnorm_logs", (0, 0), 200.0, "level 1, transition step 0: state after"),
        ("levels.2.injectors.logs3", (1, 0), 60.0, "level 3, step 1: network of the injector"),
        ("levels.1.couplings.logs3", (0, 0), 60.0, "level 2, step 0: network of the coupling"),
        ("levels.1.noise_couplings.logs3", (0, 0), 60.0, "level 2, step 1: network of the noise coupling"),
        ("encoder.conv_first.weight", (0, 0, 0, 0), 3e38, "the encoder's features for level"),
    ],
)
def test_where_it_began(step, name, place, value, where):
    model, objective, inputs, batch = step
    with torch.no_grad():
        model.get_parameter(name)[place] = value
    assert where in first_nonfinite(model, objective, inputs, batch)


def test_a_gradient_whose_norm_overflows(step):
    """Each of its values is finite, their squares are not."""
    model, objective, inputs, batch = step
    original = objective.forward
    objective.forward = lambda *inputs: original(*inputs) + 1e30 * model.levels[1].actnorm_bias[0, 0]
    said = first_nonfinite(model, objective, inputs, batch)
    assert said == "the norm of the gradient, which overflows; its largest value, 1e+30, is of levels.1.actnorm_bias"


def test_a_gradient_that_is_not_finite(step):
    """Forwards all is finite: sqrt'(0) is not."""
    model, objective, inputs, batch = step
    original = objective.forward
    weight = model.levels[1].injectors.conv2

    def forward(*inputs):
        result = original(*inputs)
        return torch.cat([(result[0] + (weight[0, 0, 0, 0, 0] * 0).abs().sqrt())[None], result[1:]])

    objective.forward = forward
    assert first_nonfinite(model, objective, inputs, batch) == "gradient of injectors.conv2 of level 2, step 0"
