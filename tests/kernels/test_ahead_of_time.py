"""Every kernel compiled for three generations of GPUs, none of which is needed: no spills, no TF32, little shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not hasattr(triton, "knobs"), reason="ahead_of_time is written for Triton 3.6")

SHARED = 99 * 1024  # bytes that a program may use on sm_86 and sm_89; sm_80, sm_90 and sm_100 have more
CHANNELS = ("12", "24", "192")  # one of each size of tile, some minutes of one core each


@pytest.mark.parametrize("channels", CHANNELS)
def test_no_kernel_spills(tmp_path, channels, record_property):
    from ncsr_fast.kernels.ahead_of_time import TARGETS, Row, table, worst

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "ncsr_fast.kernels.ahead_of_time", "--json", "--channels", channels]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [Row(**row) for row in json.loads(run.stdout)]
    report = table(worst(rows))
    record_property("kernels ahead of time", report)
    print(report)
    calls = Counter((row.target, row.channels) for row in rows)
    # two directions and layouts of: affine, gaussian (2 kernels), step (3) with two dtypes of h, and step without h (3)
    assert calls == {(target, int(channels)): 4 * (2 * (2 + 2 + 3) + 3) for target in TARGETS}
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    assert [row for row in rows if row.tf32] == []
