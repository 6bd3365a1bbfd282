"""A run that was stopped, by whatever and whenever, ends as one that was not: bit for bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import textwrap
import zipfile
from dataclasses import replace

import pytest
import torch
from forks import Fork
from support import assert_same_weights, log_rows, tiny_settings

from ncsr_fast import NCSR
from ncsr_fast.files import CheckpointError
from ncsr_fast.training import TrainingStopped, train
from ncsr_fast.training.stages import EncoderObjective, FlowObjective


@pytest.fixture(scope="module")
def settings(kept_photos):
    # a cache and a worker too: their processes are killed with the run's
    changes = {"validation_images": 1, "validation_size": 32, "temperatures": (0.8,)}
    return tiny_settings(kept_photos, workers=1, cache_gib=0.1, backoff=0.5, **changes)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(settings, folder, "cpu")
    return folder


def assert_as_whole(run, whole) -> None:
    assert_same_weights(NCSR.from_pretrained(run / "model"), NCSR.from_pretrained(whole / "model"))
    assert_same_weights(NCSR.from_pretrained(run / "best"), NCSR.from_pretrained(whole / "best"))
    assert log_rows(run, timeless=True) == log_rows(whole, timeless=True)


class Interrupted(Exception):
    """Stands for a kill between two checkpoints."""


@pytest.mark.parametrize(
    "objective, at",
    [
        pytest.param(EncoderObjective, 2, marks=pytest.mark.slow),
        pytest.param(FlowObjective, 0, marks=pytest.mark.slow),
        (FlowObjective, 3),
        pytest.param(FlowObjective, 5, marks=pytest.mark.exhaustive),  # (FlowObjective, 3) too is one step after a checkpoint
    ],
)
@pytest.mark.slow
def test_stopped_between_checkpoints(settings, whole, tmp_path, monkeypatch, objective, at):
    """The steps since the last one are done again, and come out the same."""
    original, calls = objective.forward, []

    def forward(self, *inputs):
        calls.append(None)
        if len(calls) == at + 1:
            raise Interrupted
        return original(self, *inputs)

    monkeypatch.setattr(objective, "forward", forward)
    with pytest.raises(Interrupted):
        train(settings, tmp_path, "cpu")
    monkeypatch.setattr(objective, "forward", original)
    torch.manual_seed(99)  # whatever the process did before
    train(settings, tmp_path, "cpu")
    assert_as_whole(tmp_path, whole)


# Trains in a process of its own, which does something fatal at a moment of its choosing.
PROGRAM = """
import json, os, signal, sys, threading
from ncsr_fast.training import TrainSettings, train
settings = TrainSettings.from_dict(json.loads(sys.argv[1]))
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
{trouble}
train(settings, sys.argv[2], "cpu")
"""

IN_A_SAVE = """
import torch
save, count = torch.save, []
def half(state, path):
    save(state, path)
    count.append(None)
    if len(count) == {number}:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        kill()
torch.save = half
"""

BEFORE_THE_RENAME = """
replace, count = os.replace, []
def stopped(source, target):
    count.append(None)
    if len(count) == {number}:
        kill()
    replace(source, target)
os.replace = stopped
"""

AFTER_SECONDS = "threading.Timer({number}, kill).start()"


def run_to_its_end(settings, folder, trouble: str = "") -> int:
    program = PROGRAM.format(trouble=textwrap.dedent(trouble))
    fork = Fork(program, json.dumps(settings.to_dict()), str(folder), folder=folder.parent)
    code = fork.wait()
    assert code in (0, -signal.SIGKILL), fork.errors
    return code


@pytest.mark.slow
@pytest.mark.parametrize(
    "trouble, numbers",
    [(IN_A_SAVE, (1, 4)), (BEFORE_THE_RENAME, (2, 9)), pytest.param(AFTER_SECONDS, (2.5, 0.7), marks=pytest.mark.exhaustive)],
    ids=["in a save", "before a rename", "at any time"],
)
def test_killed(settings, whole, tmp_path, trouble, numbers):
    """SIGKILL, twice, and then left alone."""
    run = tmp_path / "run"
    for number in numbers:
        code = run_to_its_end(settings, run, trouble.format(number=number))
        assert code == -signal.SIGKILL or trouble is AFTER_SECONDS
    assert run_to_its_end(settings, run) == 0
    assert_as_whole(run, whole)
    assert not list((run / "checkpoints").glob(".*")), "what the killed process left"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(settings, whole, tmp_path, monkeypatch, number):
    original, calls = FlowObjective.forward, []

    def forward(self, *inputs):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return original(self, *inputs)

    settings = replace(settings, save_every=100)
    monkeypatch.setattr(FlowObjective, "forward", forward)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=rf"signal {int(number)} after step 4 of stage 'flow' and saved") as stopped:
        train(settings, tmp_path, "cpu")
    assert stopped.value.exit_status == 128 + number
    assert signal.getsignal(number) is before
    monkeypatch.setattr(FlowObjective, "forward", original)
    train(settings, tmp_path, "cpu")
    assert_as_whole(tmp_path, whole)


def flipped(data: bytes) -> bytes:
    """One bit of the largest tensor is another: what lies between the records of a file means nothing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        middle = data.index(archive.read(largest)) + largest.file_size // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        pytest.param(lambda data: data[:-1000], marks=pytest.mark.slow),
        pytest.param(lambda data: b"", marks=pytest.mark.slow),
    ],
    ids=["one bit", "cut", "empty"],
)
def test_a_damaged_checkpoint_is_passed_over(settings, whole, run, damage):
    newest = run / "checkpoints" / "flow-00000006.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match="flow-00000006.pt' is damaged and is not used"):
        train(settings, run, "cpu")
    assert_as_whole(run, whole)


def test_a_run_whose_checkpoints_are_all_damaged(settings, run):
    for path in (run / "checkpoints").glob("flow-*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of stage 'flow' in"), pytest.warns(UserWarning):
        train(settings, run, "cpu")


@pytest.mark.slow
def test_the_last_few_checkpoints_and_the_best_weights_are_kept(settings, tmp_path):
    model = train(replace(settings, keep=1, validate_every=2), tmp_path, "cpu")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["encoder-00000003.pt", "flow-00000006.pt"]
    validations = [row for row in log_rows(tmp_path) if row["stage"] == "flow" and "validation" in row]
    lowest = min(validations, key=lambda row: row["validation"]["nll"])
    best = json.loads((tmp_path / "best" / "validation.json").read_text())
    assert best == {"step": lowest["step"], **lowest["validation"]}
    if lowest["step"] == 6:
        assert_same_weights(NCSR.from_pretrained(tmp_path / "best"), model)


def test_the_log_of_a_run_does_not_grow_by_resuming(settings, whole, run):
    with open(run / "log.jsonl", "a") as file:
        file.write('{"stage": "flow", "st')  # cut by a kill
    train(settings, run, "cpu")
    assert (run / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
