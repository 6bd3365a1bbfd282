"""Worker processes: signals are the main process's affair, and they never keep it from ending."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from forks import Fork

from ncsr_fast.data import RandomCrops, crop_loader

_ENDING = """
import sys
from ncsr_fast.data import RandomCrops, crop_loader

iterator = iter(crop_loader(RandomCrops(sys.argv[1], scale=4, crop=32), 2, 0, 10**6, workers=1))
next(iterator)  # and it is still there when the interpreter ends
"""


def process_and_threads(hr, scale, generator):
    """An LR image that says where it was made."""
    lr = torch.zeros(3 * 8 * 8, dtype=torch.uint8)
    lr[:9] = torch.tensor([*os.getpid().to_bytes(8, "big"), torch.get_num_threads()])
    return lr.view(3, 8, 8)


@pytest.fixture
def interruptible():
    """Ctrl-C as it is by default: a shell's jobs in the background ignore it from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_signals(photos, number, interruptible):
    crops = RandomCrops(photos, scale=4, crop=32, degradation=process_and_threads)
    batches = iter(crop_loader(crops, 2, 0, 100, workers=1))
    made = next(batches)["lr"][0].flatten().tolist()
    worker, threads = int.from_bytes(made[:8], "big"), made[8]
    assert worker != os.getpid() and threads == 1
    for _ in range(3):
        os.kill(worker, number)
        time.sleep(0.02)
    assert len(list(batches)) == 99
    assert worker not in [child.pid for child in multiprocessing.active_children()]  # other tests may have left theirs


@pytest.mark.slow
def test_the_main_process_ends_with_batches_still_to_come(photos, tmp_path):
    """`multiprocessing` ends its children by SIGTERM then, and waits for them."""
    fork = Fork(_ENDING, str(photos), folder=tmp_path)
    assert fork.wait() == 0 and fork.errors == ""
