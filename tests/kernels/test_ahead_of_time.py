"""Every kernel compiled for three generations of GPUs, none of which is needed: no spills, no TF32, wide loads and stores."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import installation
import pytest
from caching import made_once

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

import triton  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(triton, "knobs"), reason="ahead_of_time is written for Triton 3.6")

SHARED = 99 * 1024  # bytes that a program may use on sm_86 and sm_89; sm_80, sm_90 and sm_100 have more
CHANNELS = (12, 24, 96, 192)  # every size of tile, a minute of one core on each target
TENSOR_CORES: set[str] = set()  # kernels that should compute products with them
EVERY_CELL = [(target, channels) for channels in CHANNELS for target in (80, 90, 100)]
# The largest tile needs most, and 12 channels are aligned the least; and what a kernel needs it needs on all targets, but
# for a few registers: its products, of float32, are not of tensor cores, in which the targets differ. The rest with
# `make test-all`.
CELLS = [(90, 12, "forward"), (90, 192, "inverse")]
CELLS += [pytest.param(*cell, "every", marks=pytest.mark.exhaustive) for cell in EVERY_CELL]
# of kernels that "auto" does not take, on tensor cores, in which targets differ; half a minute each
NETWORKS = list(itertools.product((80, 90, 100), (12, 24, 48, 96, 192), ("bf16", "tf32", "fp32")))


@pytest.mark.slow
@pytest.mark.parametrize("target, channels, variants", CELLS)
def test_what_every_kernel_needs(pytestconfig, target, channels, variants):
    from ncsr_fast.benchmarks.cost_model import GPUS, predict
    from ncsr_fast.kernels.ahead_of_time import TARGETS, VARIANTS, Row, table, worst

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", "--json", "--targets", str(target), "--channels", str(channels)]
    arguments += ["--variants", variants]
    rows = [Row(**row) for row in printed(pytestconfig, f"ahead_of_time-{target}-{channels}-{variants}", arguments)]
    print(table(worst(rows)))
    calls = Counter((row.target, row.channels) for row in rows)
    # of each variant affine, gaussian_split (3 kernels) and flow_step (5), of float32 flow_step without h (5); one of matrices
    count, single = len(VARIANTS[variants]), sum(dtype == "float32" for *_, dtype in VARIANTS[variants])
    assert {cell[0] for cell in EVERY_CELL} == set(TARGETS)
    assert calls == {(target, channels): count * (3 + 3 + 5) + single * 5 + 1}
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    assert [row for row in rows if row.tf32] == []
    assert {row.kernel for row in rows if row.tensor_cores} == TENSOR_CORES
    assert [row for row in rows if not 0 < predict(row, GPUS["H200"]).seconds < 1e-2] == []  # it knows the loops of each
    # Four numbers at once, 16 bytes or 8 of bfloat16, but for the few that are not of an image
    images = [row for row in rows if row.kernel != "sum_partials_kernel"]
    assert [row for row in images if row.call.endswith("h=float32") and row.wide < 0.75] == []
    assert [row for row in images if row.call.endswith("h=bfloat16") and (row.wide < 0.5 or row.middling < 0.75)] == []


PRODUCTS = {"conv3x3_kernel", "conv3x3_weight_kernel"}
# Kernels of three residual blocks of the encoder, forward and backward, and of hoisted convolutions by 2 and by 1
TOGETHER = {
    "encoder": {
        "pack_dense_blocks_kernel": 2, "conv3x3_kernel": 2 * 45,
        "conv3x3_weight_kernel": 3, "sum_dense_block_partials_kernel": 3,
    },
    "hoisting": {
        "weights_by_slot_kernel": 4, "hoisted_kernel": 2, "conv3x3_kernel": 2, "hoisted_backward_kernel": 2,
        "conv3x3_weight_kernel": 2, "sum_weight_partials_kernel": 2, "hoisted_weight_kernel": 2, "sum_slots_kernel": 2,
    },
}  # fmt: skip
EVERY_CONVOLUTION = [
    (target, channels, precision)
    for precision in ("bf16", "tf32", "fp32")
    for channels in (3, 33, 64, 160, 192)
    for target in (80, 90, 100)
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("target, channels, precision", EVERY_CONVOLUTION)
def test_what_a_convolution_needs(pytestconfig, target, channels, precision):
    """No spills; products on tensor cores but in float32, in TF32 where it is asked for alone; 16 bytes at once."""
    from ncsr_fast.kernels.ahead_of_time import Row, table, worst
    from ncsr_fast.kernels.calls import CONVOLUTIONS

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", "--json", "--targets", str(target), "--channels", str(channels)]
    arguments += ["--convolutions", precision]
    rows = [Row(**row) for row in printed(pytestconfig, f"ahead_of_time-{target}-{channels}-{precision}", arguments)]
    print(table(worst(rows)))
    passes = {"copy_weights_kernel": 2, "conv3x3_kernel": 2, "conv3x3_weight_kernel": 1, "sum_weight_partials_kernel": 1}
    assert Counter(row.kernel for row in rows) == {name: count * len(CONVOLUTIONS) for name, count in passes.items()}
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    assert {row.kernel for row in rows if row.tensor_cores} == (set() if precision == "fp32" else PRODUCTS)
    assert {row.kernel for row in rows if row.tf32} == (PRODUCTS if precision == "tf32" else set())
    # In TF32 a transposed operand goes to shared memory number by number: dy in the weight gradient, a third of what it reads.
    images = [row for row in rows if row.kernel in PRODUCTS and channels % 16 == 0]
    assert [row for row in images if row.wide < 0.7] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("calls", TOGETHER)
def test_what_convolutions_together_need(pytestconfig, calls, target, precision):
    """As single ones, at the published numbers of channels."""
    from ncsr_fast.kernels.ahead_of_time import Row, table, worst

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", "--json", "--targets", str(target), "--channels", "64"]
    rows = printed(pytestconfig, f"ahead_of_time-{calls}-{target}-{precision}", [*arguments, f"--{calls}", precision])
    rows = [Row(**row) for row in rows]
    print(table(worst(rows)))
    assert Counter(row.kernel for row in rows) == TOGETHER[calls]
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    products = PRODUCTS | {name for name in TOGETHER[calls] if name.startswith("hoisted")}
    products &= set(TOGETHER[calls])
    assert {row.kernel for row in rows if row.tensor_cores} == (set() if precision == "fp32" else products)
    assert {row.kernel for row in rows if row.tf32} == (products if precision == "tf32" else set())
    assert [row for row in rows if row.kernel in products and row.wide < 0.7] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout, most", [("nhwc", 1), pytest.param("nchw", 3, marks=pytest.mark.exhaustive)])
def test_images_of_other_sizes_compile_no_other_kernels(pytestconfig, layout, most):
    """In the engine's layout. In the other there are 3: 16 divides the strides of channels and samples, of samples, or none."""
    variant = ("forward", layout, "float32")
    code = f"from ncsr_fast.kernels import ahead_of_time as a; print(a.compiled_kernels(90, 12, {variant!r}))"
    assert printed(pytestconfig, f"compiled_kernels-{layout}", ["-c", code]) == most


@pytest.mark.exhaustive
def test_compiled_kernels_are_kept_for_other_processes(tmp_path):
    """By Triton, in the folder TRITON_CACHE_DIR: what a second process starts is not compiled again."""
    code = """
import torch, triton
from ncsr_fast import kernels
from ncsr_fast.kernels import ahead_of_time
driver, found = ahead_of_time._compiling(90), []
def heard(*, cache_hit, **told):
    found.append(cache_hit)
    driver.compiled(**told)
triton.knobs.compilation.listener = heard
kernels.inverse_logdet(torch.empty(1, 4, 4, dtype=torch.float64, device="meta"))
print(*found)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    runs = [subprocess.run([sys.executable, "-W", "ignore", "-c", code], **options) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert [run.stdout.strip() for run in runs] == ["False", "True"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("target, channels, precision", NETWORKS)
def test_what_the_networks_of_the_steps_need(pytestconfig, target, channels, precision):
    """Products are of tensor cores in bf16 and TF32, and of numbers rounded to TF32 in the latter alone."""
    from ncsr_fast.kernels.ahead_of_time import Row, table, worst

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", "--networks", precision, "--json"]
    arguments += ["--targets", str(target), "--channels", str(channels)]
    rows = [Row(**row) for row in printed(pytestconfig, f"ahead_of_time-networks-{target}-{channels}-{precision}", arguments)]
    print(table(worst(rows)))
    called = itertools.product(("coupling", "shared", "injector"), ("pack_networks_kernel", "hidden_kernel", "output_kernel"))
    assert sorted((row.call, row.kernel) for row in rows) == sorted((f"{name} {precision}", kernel) for name, kernel in called)
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    products = [row for row in rows if row.kernel != "pack_networks_kernel"]
    assert all((row.tensor_cores > 0) == (precision != "fp32") for row in products)
    assert all(row.tf32 == (precision == "tf32") for row in products)
    # Loads of 16 bytes, but of 6 channels of the state, which are 8 bytes and a third of them masked
    least = 0.4 if channels == 12 else 0.85
    assert [row for row in products if row.wide < least or row.middling < 0.85] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("target, channels, precision", NETWORKS)
def test_what_the_gradients_of_the_networks_need(pytestconfig, target, channels, precision):
    """Likewise, with hidden layers recomputed and saved; sums over parts are of no tensor cores."""
    from ncsr_fast.kernels.ahead_of_time import Row, table, worst

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", "--gradients", precision, "--json"]
    arguments += ["--targets", str(target), "--channels", str(channels)]
    rows = [Row(**row) for row in printed(pytestconfig, f"ahead_of_time-gradients-{target}-{channels}-{precision}", arguments)]
    print(table(worst(rows)))
    rows = [row for row in rows if row.kernel != "pack_networks_kernel"]
    sums = ["network_weight_kernel", "sum_network_partials_kernel"]
    kernels = {"coupling": ["hidden_backward_kernel", "state_backward_kernel", *sums, sums[1], *sums]}
    kernels["injectors"] = ["hidden_backward_kernel", *sums, sums[1]]
    expected = [(name, kernel) for name, own in kernels.items() for kernel in 2 * own]
    assert sorted((row.call.split()[0], row.kernel) for row in rows) == sorted(expected)
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    products = [row for row in rows if row.kernel != "sum_network_partials_kernel"]
    assert all((row.tensor_cores > 0) == (precision != "fp32") for row in products)
    assert all(row.tf32 == (precision == "tf32") for row in products)
    # Loads of 16 bytes, but of 6 channels of the state and 12 of dh, which are 8 bytes
    data = [row for row in products if row.kernel != "network_weight_kernel"]
    least = 0.35 if channels == 12 else 0.8
    assert [row for row in data if row.wide < least or row.middling < 0.85] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", [80, 90, 100])
def test_what_the_folding_of_networks_needs(pytestconfig, target):
    """Rows of 9·326 numbers are no multiple of 16 bytes, and are read 8 or 16 bytes at once all the same."""
    from ncsr_fast.kernels.ahead_of_time import Row, table, worst

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", "--filters", "bf16", "--json", "--targets", str(target)]
    arguments += ["--channels", "12"]
    rows = [Row(**row) for row in printed(pytestconfig, f"ahead_of_time-filters-{target}", arguments)]
    print(table(worst(rows)))
    assert [row.kernel for row in rows] == ["fold_filters_forward_kernel", "fold_filters_backward_kernel"]
    assert [row for row in rows if row.spills or row.shared > SHARED or row.middling < 0.5] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("target, channels, precision", NETWORKS)
@pytest.mark.parametrize("calls", ["steps", "large-steps"])
def test_what_coupled_steps_need(pytestconfig, target, channels, precision, calls):
    """With the first layers in the kernel and without: no spills, tensor cores, and TF32 where it is asked for alone."""
    from ncsr_fast.kernels.ahead_of_time import Row, table, worst
    from ncsr_fast.kernels.coupled_step import MIXED

    arguments = ["-m", "ncsr_fast.kernels.ahead_of_time", f"--{calls}", precision, "--json"]
    arguments += ["--targets", str(target), "--channels", str(channels)]
    rows = [Row(**row) for row in printed(pytestconfig, f"ahead_of_time-{calls}-{target}-{channels}-{precision}", arguments)]
    print(table(worst(rows)))
    mixing = [] if channels <= MIXED else ["flow_step_forward_kernel"]
    first = ["hidden_kernel"] if calls == "steps" else []
    expected = {"encoding": [*first, "coupled_step_kernel", *mixing], "coupling": [*first, "coupled_step_kernel"]}
    expected["decoding"] = expected["encoding"]
    called = [(f"{name} {precision}", kernel) for name, kernels in expected.items() for kernel in kernels]
    assert sorted((row.call, row.kernel) for row in rows) == sorted(called)
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared > SHARED] == []
    coupled = [row for row in rows if row.kernel == "coupled_step_kernel"]
    assert all((row.tensor_cores > 0) == (precision != "fp32") for row in coupled)
    assert all(row.tf32 == (precision == "tf32") for row in coupled)
    # A matrix in the kernel is read number by number, and is no image. Of the others a quarter, as for convolutions.
    assert [row for row in coupled if row.middling < 0.75 or channels > MIXED and row.wide < 0.75] == []


@pytest.mark.exhaustive
def test_networks_of_images_of_other_sizes_compile_no_other_kernels(pytestconfig):
    code = "from ncsr_fast.kernels import ahead_of_time as a; print(a.compiled_kernels(90, 12, 'bf16', a.network_calls))"
    assert printed(pytestconfig, "compiled_kernels-networks", ["-c", code]) == 1


def printed(pytestconfig: pytest.Config, name: str, arguments: list[str]) -> Any:
    """What Python prints as JSON with these arguments, compiling kernels; printed again only after they have changed."""

    def compile_kernels(folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(folder / "triton")
        command = [sys.executable, *arguments]
        run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        (folder / "printed.json").write_text(run.stdout)
        shutil.rmtree(folder / "triton")

    sources = sorted(Path(importlib.util.find_spec("ncsr_fast.kernels").origin).parent.glob("*.py"))
    folder = made_once(pytestconfig, name, [*sources, *arguments, triton.__version__], compile_kernels)
    return json.loads((folder / "printed.json").read_text())
