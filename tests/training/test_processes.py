"""Several processes, started by torchrun, do to a batch what one would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import Fork
from support import log_rows, tiny_settings
from torch.distributed import TCPStore

from ncsr_fast import NCSR
from ncsr_fast.data.crops import RandomCrops
from ncsr_fast.training import TrainSettings, train
from ncsr_fast.training.processes import Processes

PROGRAM = """
import json, sys
from ncsr_fast.training import TrainSettings, TrainingStopped, train
try:
    train(TrainSettings.from_dict(json.loads(sys.argv[1])), sys.argv[2], "cpu")
except TrainingStopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(stopped.exit_status)
"""


@pytest.fixture
def settings(photos):
    # the encoder's phases and the L1 term too; no milestone, so that rounding is all that can differ
    return tiny_settings(photos, batch=4, l1_weight=1.0, unfreeze=0.5, milestones=(), save_every=100, validation_images=3)


@contextlib.contextmanager
def launched(settings: TrainSettings, folder: Path) -> Iterator[list[Fork]]:
    """Two processes that train together, with the variables and the store of torchrun's."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    place = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    arguments = PROGRAM, json.dumps(settings.to_dict()), str(folder)
    yield [Fork(*arguments, folder=folder.parent, RANK=rank, LOCAL_RANK=rank, **place) for rank in ("0", "1")]


def run_together(settings: TrainSettings, folder: Path) -> None:
    with launched(settings, folder) as forks:
        assert [fork.wait() for fork in forks] == [0, 0], [fork.errors for fork in forks]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    # what processes exchange are gradients in float32, however they came about
    [
        {},
        *(
            pytest.param(c, marks=pytest.mark.exhaustive)
            for c in ({"checkpoint": False, "precision": "bf16"}, {"checkpoint": False})
        ),
    ],
    ids=["fp32", "stored bf16", "stored"],
)
def test_two_processes_train_as_one_does(settings, tmp_path, changes):
    settings = replace(settings, **changes)
    one = train(settings, tmp_path / "one", "cpu")
    run_together(settings, tmp_path / "two")
    rounding = 3e-2 if settings.precision == "bf16" else 1e-4
    for first, second in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() & {"loss", "nll", "l1", "grad_norm"}:
            assert second[key] == pytest.approx(first[key], rel=rounding), (first["step"], key)
    two = NCSR.from_pretrained(tmp_path / "two" / "model")
    moved, apart = distance(start(settings), one), distance(one, two)
    assert apart < rounding * moved, (apart, moved)


def start(settings: TrainSettings) -> NCSR:
    torch.manual_seed(settings.seed)
    return NCSR(settings.model)


def distance(first: NCSR, second: NCSR) -> float:
    pairs = zip(first.parameters(), second.parameters())
    return float(torch.stack([(a - b).detach().double().square().sum() for a, b in pairs]).sum().sqrt())


@pytest.mark.slow
def test_actnorms_see_the_global_batch(settings, threads, tmp_path):
    """Bit for bit as one process sets them; so they are the same in all."""
    settings = replace(settings, encoder_steps=0, steps=1, lr=1e-30)  # a step that moves nothing but zeros
    threads(1)  # as each of the two has
    train(settings, tmp_path / "one", "cpu")
    run_together(settings, tmp_path / "two")
    one, two = (NCSR.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-29) for name in one)
    assert one["actnorm_initialized"] and one["levels.1.actnorm_logs"].abs().min() > 0


@pytest.mark.slow
def test_a_stop_signal_to_one_stops_all_and_the_run_resumes(settings, tmp_path):
    settings = replace(settings, encoder_steps=0, steps=400, validate_every=400, save_every=400, unfreeze=0.0)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    with launched(settings, tmp_path / "run") as forks:
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(forks[1].pid, signal.SIGTERM)
        assert [fork.wait() for fork in forks] == [143, 143]
    assert all("stopped by signal 15 after step" in fork.errors for fork in forks)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("flow-*.pt")
    step = torch.load(saved, weights_only=True)["step"]
    assert 0 < step < 400


@pytest.mark.slow
def test_the_command_line_under_torchrun(photos, tmp_path):
    """Its own options must not take ours for theirs, as it does with --run."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ncsr_fast.cli.main"]
    flags = "--preset ncsr-compact-x4 --encoder-steps 0 --steps 1 --batch 2 --crop 32 --validation-images 1 --device cpu"
    command = [*start, "train", *flags.split(), "--images", str(photos), "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert NCSR.from_pretrained(tmp_path / "run" / "model").actnorm_initialized


def test_shares_make_up_the_batch():
    shares = [Processes(torch.device("cpu"), rank, 3).share(12) for rank in range(3)]
    assert [list(range(12))[share] for share in shares] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_batch_that_cannot_be_shared_is_refused(settings, photos):
    from ncsr_fast.data.crops import crop_loader

    crops = RandomCrops(photos, scale=4, crop=32)
    with pytest.raises(ValueError, match="multiple of the number of processes, 3, not 4"):
        crop_loader(crops, 4, 0, 1, rank=0, world=3)
