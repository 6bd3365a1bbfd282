"""`ncsr-fast tune`: what becomes of measurements, which are made up here, and what is measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ncsr_fast import ops, tuning
from ncsr_fast.benchmarks import tune
from ncsr_fast.benchmarks.harness import Case
from ncsr_fast.benchmarks.registry import OPERATORS, level_shapes
from ncsr_fast.ops.backend import COMPANIONS, COVERAGE, forget

GPU = tuning.Gpu("Acme A1", "9.9")
QUICK = ("quick",)  # levels of 12, 24 and 96 channels
TRITON = ops.backends("cpu")["triton"].available  # in its interpreter
needs_triton = pytest.mark.skipif(not TRITON, reason="there are no Triton kernels whose tiles to choose")


class Timer:
    """Measurements that are made up: 1 s, or less for some names of backends and tiles."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.calls = seconds, []

    def __call__(self, case: Case, functions: dict, direction: str) -> dict[str, float]:
        tiles = dict(tuning.tiles("elementwise_forward", case.shape.size[1]))
        self.calls.append((case, tuple(functions), direction, tiles, tuning.mode()))
        return {name: self.seconds.get(name, 1.0) for name in functions}


def table(timer: Timer, **options) -> tuning.Table:
    return tune.table_of(GPU, Path("acme.json"), "cpu", QUICK, timer, **{"say": lambda line: None, **options})


def gain_of(found: tuning.Table, kernel: str, dtype: str | None = "float32") -> dict[str, tuple[float | None, bool]]:
    return {each.backend: (each.gain, each.used) for each in found.backends if (each.kernel, each.dtype) == (kernel, dtype)}


def test_the_gain_is_the_ratio_to_the_reference():
    found = table(Timer(native=0.5, triton=0.25))
    assert (found.gpu, found.capability) == GPU
    assert gain_of(found, "affine") == {"triton": (4.0, True), "native": (2.0, True)} if TRITON else {"native": (2.0, True)}
    order = [each.backend for each in found.backends if (each.kernel, each.dtype) == ("affine", "float32")]
    assert order == ["triton", "native"][not TRITON :]
    assert {each.provenance["gpu"] for each in found.backends} == {"Acme A1"}
    assert all(each.provenance["torch"] == torch.__version__ and each.provenance["date"] for each in found.backends)


def test_every_kernel_and_dtype_has_an_entry_of_every_backend():
    found = table(Timer())
    expected = set()
    for backend in COVERAGE:
        for kernel, coverage in COVERAGE[backend].items():
            if kernel in COMPANIONS or kernel.endswith("_weights"):  # of the backend that reads them
                continue
            one_dtype = kernel in ("fold", "inverse_logdet")
            if "cpu" in coverage.devices and ops.backends("cpu")[backend].available:
                expected |= {(kernel, None if one_dtype else str(each)[6:], backend) for each in coverage.dtypes}
    listed = {(each.kernel, each.dtype, each.backend) for each in found.backends}
    assert listed == {key for key in expected if key[1] in (None, *tune.DTYPES)}


def test_a_slower_backend_and_one_that_fails_are_not_used():
    found = table(Timer(native=math.inf, triton=1.25))
    assert gain_of(found, "flow_step")["native"] == (0.0, False)
    assert not TRITON or gain_of(found, "flow_step")["triton"] == (0.8, False)


def test_what_no_graph_can_hold_otherwise_is_used_however_slow():
    found = table(Timer(native=2.0, triton=4.0))
    used = gain_of(found, "inverse_logdet", None)
    assert used["native"] == (None, True) and list(used)[0] == "native"
    (note,) = {each.provenance["note"] for each in found.backends if each.kernel == "inverse_logdet"}
    assert note == "PyTorch's makes the host wait, so that no CUDA graph can hold it"
    assert gain_of(found, "affine")["native"] == (0.5, False)


def test_where_the_reference_fails_what_does_not_is_used():
    found = table(Timer(reference=math.inf, triton=math.inf))
    assert gain_of(found, "affine")["native"] == (None, True)
    assert not TRITON or gain_of(found, "affine")["triton"] == (0.0, False)


@needs_triton
def test_the_best_tiles_are_chosen_and_hold_while_backends_are_compared():
    timer = Timer(**{"TILE=1024 num_warps=8": 0.25, "BLOCK_P=16 num_stages=1": math.inf})
    found = table(timer)
    tiles = {(each.kernel, each.channels): (each.sizes, each.gain) for each in found.tiles}
    assert set(tiles) == {(name, channels) for name in tune.TILINGS for channels in (16, 32, 128)}
    assert tiles["elementwise_forward", 16] == ({"TILE": 1024, "num_warps": 8}, 4.0)
    assert tiles["flow_step_forward", 16] == ({}, 1.0)  # its own, which no other is faster than
    tried = {tuple(each) for _, names, _, each, _ in timer.calls if "TILE=1024 num_warps=8" in names}
    assert ("TILE", "num_warps") in tried
    injector = [call for call in timer.calls if call[0].operator == "affine_injector"]
    compared = [each for _, names, _, each, _ in injector if "reference" in names]
    assert compared and all(each == {"TILE": 1024, "num_warps": 8} for each in compared)
    assert tuning.tiles("elementwise_forward", 12) == {}  # and no longer


@needs_triton
def test_tiles_are_measured_in_the_direction_that_runs_them():
    timer = Timer()
    table(timer)
    directions = {}
    for case, names, direction, _, _ in timer.calls:
        if "reference" not in names:
            directions.setdefault((case.operator, "own" if names == ("own",) else names[0].split("=")[0]), set()).add(direction)
    assert directions["inverse_logdet", "num_warps"] == {"forward"}
    assert directions["flow_step", "BLOCK_P"] == {"forward", "inverse", "backward", "inverse-backward"}


def test_earlier_tables_have_no_say(monkeypatch):
    """Neither those of this GPU nor the mode, which is what it was afterwards."""
    monkeypatch.setenv(tuning.MODE, "strict")
    timer = Timer()
    table(timer)
    assert {mode for *_, mode in timer.calls} == {"default"} and tuning.mode() == "strict"


def test_every_shape_and_direction_is_measured():
    timer = Timer()
    table(timer)
    compared = [(case.shape.size[1], direction) for case, names, direction, *_ in timer.calls
                if case.operator == "flow_step" and case.dtype == "bfloat16" and "reference" in names]  # fmt: skip
    directions = ("forward", "inverse", "backward", "inverse-backward")
    channels = [shape.size[1] for shape in level_shapes("quick")]
    assert sorted(compared) == sorted((each, direction) for each in channels for direction in directions)
    assert {case.operator for case, *_ in timer.calls} == set(OPERATORS)


@needs_triton
def test_tiles_of_a_gpu_reach_the_launch():
    """On a GPU alone: the interpreter's are the kernel's own."""
    from ncsr_fast.kernels import flow_step

    with tuning.trying("flow_step_forward", 12, {"BLOCK_P": 128, "num_warps": 8}):
        tiles = {kind: flow_step._tiles(torch.device(kind), "flow_step_forward", 12, 6400) for kind in ("cuda", "cpu")}
    count, sizes = tiles["cuda"]
    assert count == 50 and sizes == {**tiles["cpu"][1], "BLOCK_P": 128, "num_warps": 8}
    assert tiles["cpu"][1]["BLOCK_P"] != 128


@pytest.fixture
def fake_gpu():
    """The fake GPU, with what was launched on it."""
    from ncsr_fast.benchmarks.fake_cuda import fake_cuda
    from ncsr_fast.benchmarks.launches import LaunchCounter

    with fake_cuda(), LaunchCounter() as counter:
        yield counter


def call_all() -> None:
    """Operators that run every kernel whose tiles can be chosen, with gradients, on the fake GPU."""
    z, h = (torch.rand(1, channels, 4, 4, device="cuda", requires_grad=True) for channels in (4, 8))
    bias, weight = (torch.rand(*size, device="cuda", requires_grad=True) for size in ((4,), (4, 4)))
    ops.gaussian_split(z, h[:, :4])[0].sum().backward()
    ops.affine_injector(z, h)[0].sum().backward()
    ops.flow_step(z, h[:, :4], bias, bias, weight, h)[0].sum().backward()


@needs_triton
@pytest.mark.slow
def test_kernels_ask_for_the_tiles_that_are_measured(monkeypatch, fake_gpu):
    from ncsr_fast.kernels import _common

    asked = set()
    monkeypatch.setattr(_common, "tiles", lambda kernel, channels: asked.add(kernel) or {})
    call_all()
    assert asked == set(tune.TILINGS)


@needs_triton
@pytest.mark.slow
def test_a_gpu_runs_what_its_table_says(monkeypatch, tmp_path, fake_gpu):
    kernels = {"elementwise_forward_kernel", "elementwise_backward_kernel", "flow_step_forward_kernel",
               "flow_step_backward_kernel", "flow_step_backward_weight_kernel", "inverse_logdet_kernel"}  # fmt: skip
    call_all()
    assert kernels <= set(fake_gpu.launches)
    choice = tuning.Choice("affine", None, "triton", 2.0, {"kind": "measured"})
    slower = tuning.Choice("flow_step", None, "triton", 0.9, {"kind": "measured"})
    (tmp_path / "default.json").write_text(tuning.text(tuning.Table(tmp_path, None, None, (choice, slower), ())))
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path)
    forget()
    fake_gpu.launches.clear()
    call_all()
    assert kernels & set(fake_gpu.launches) == {"elementwise_forward_kernel", "elementwise_backward_kernel"}
    forget()


@pytest.mark.slow
def test_results_that_are_wrong_and_calls_that_raise_are_no_candidates():
    """Of the measurement itself, on a CPU."""
    (shape,) = OPERATORS["gaussian_split"].shapes(QUICK)
    case = Case("gaussian_split", False, shape, "float32", "channels-last", "cpu")
    right = case.function("reference")

    def raises(**inputs):
        raise RuntimeError("no")

    def wrong(**inputs):
        y, logdet = right(**inputs)
        return 1.01 * y, logdet

    found = tune.medians(case, {"right": right, "wrong": wrong, "raises": raises}, "forward")
    assert found["wrong"] == found["raises"] == math.inf and 0 < found["right"] < math.inf
