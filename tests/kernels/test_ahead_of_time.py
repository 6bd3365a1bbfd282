"""Every kernel compiled for three generations of GPUs, none of which is needed: no spills, no TF32, little shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import installation
import pytest
from caching import made_once

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

import triton  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(triton, "knobs"), reason="ahead_of_time is written for Triton 3.6")

SHARED = 99 * 1024  # bytes that a program may use on sm_86 and sm_89; sm_80, sm_90 and sm_100 have more
CHANNELS = (12, 24, 192)  # one of each size of tile, half a minute of one core on each target
EVERY_CELL = [(target, channels) for channels in CHANNELS for target in (80, 90, 100)]
# The largest tile needs most; and what a kernel needs it needs on all targets, but for a few registers: its products, of
# float32, are not of tensor cores, in which the targets differ. The rest with `make test-all`.
IN_EVERY_RUN = {(90, 192)}
CELLS = [pytest.param(*cell, marks=() if cell in IN_EVERY_RUN else pytest.mark.exhaustive) for cell in EVERY_CELL]


@pytest.mark.slow
@pytest.mark.parametrize("target, channels", CELLS)
def test_no_kernel_spills(pytestconfig, target, channels):
    from ncsr_fast.kernels.ahead_of_time import TARGETS, Row, table, worst

    def compile_kernels(folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(folder / "triton")
        command = [sys.executable, "-m", "ncsr_fast.kernels.ahead_of_time", "--json"]
        command += ["--targets", str(target), "--channels", str(channels)]
        run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        (folder / "rows.json").write_text(run.stdout)
        shutil.rmtree(folder / "triton")

    sources = sorted(Path(importlib.util.find_spec("ncsr_fast.kernels").origin).parent.glob("*.py"))
    causes = [*sources, triton.__version__]
    folder = made_once(pytestconfig, f"ahead_of_time-{target}-{channels}", causes, compile_kernels)
    rows = [Row(**row) for row in json.loads((folder / "rows.json").read_text())]
    print(table(worst(rows)))
    calls = Counter((row.target, row.channels) for row in rows)
    # two directions and layouts of: affine, gaussian (2 kernels), step (3) with two dtypes of h, and step without h (3);
    # and one of matrices
    assert {cell[0] for cell in EVERY_CELL} == set(TARGETS)
    assert calls == {(target, channels): 4 * (2 * (2 + 2 + 3) + 3) + 1}
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    assert [row for row in rows if row.tf32] == []
