"""The predictions of the cost model, computed by hand for kernels and a GPU of round numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ncsr_fast import ops, tuning
from ncsr_fast.benchmarks import cost_model
from ncsr_fast.benchmarks.cost_model import (
    CALLS,
    GPUS,
    LAUNCH,
    PRECISIONS,
    Gpu,
    chosen,
    gains,
    per_warp,
    predict,
    predicted_table,
    resident,
    table,
)

ROUND = Gpu("Round", "9.0", multiprocessors=10, clock=1e9, bandwidth=1e12, bfloat16=1e15, tf32=5e14, float32=1e13)


def row(**changes) -> SimpleNamespace:
    """A kernel that does next to nothing: 1 program of 4 warps and 100 instructions."""
    values = dict(
        channels=12, operator="op", kernel="some_kernel", call="forward nhwc h=float32", function="op_forward", registers=32,
        shared=0, tf32=False, programs=1, warps=4, bytes=0, issued=[100], tensor_flops=[0], fp32_flops=[0], accessed=[0],
        arguments={},
    )  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    "limit, seconds, changes",
    [
        ("launch", 2e-6, {}),
        ("memory", 1e-3, {"bytes": 10**9}),  # 1 GB at 1 TB/s
        ("L2 cache", 4e9 / 6e12, {"programs": 1000, "accessed": [10**6]}),  # 1000 programs of 4 warps
        ("tensor cores", 4e10 / 1e15, {"programs": 1000, "tensor_flops": [10**7]}),
        ("tensor cores", 4e10 / 5e14, {"programs": 1000, "tensor_flops": [10**7], "tf32": True}),
        ("float32", 4e9 / 1e13, {"programs": 1000, "fp32_flops": [10**6]}),
        # 40 programs, 4 a multiprocessor at once, 16 warps, 4 a scheduler, which have it busy: 4 instructions a cycle
        ("issue slots", 4 * 4 * 10**5 / 4 / 1e9, {"programs": 40, "issued": [10**5]}),
        # 41: one multiprocessor has a fifth program
        ("issue slots", 5 * 4 * 10**5 / 4 / 1e9, {"programs": 41, "issued": [10**5]}),
        # a warp a scheduler, which waits 4 cycles for each instruction
        ("latency of instructions", 4 * 10**5 / 1e9, {"issued": [10**5]}),
        # 20 programs, 2 on each multiprocessor but not at once, by their shared memory
        ("latency of instructions", 2 * 4 * 10**5 / 1e9, {"programs": 20, "shared": 150 * 1024, "issued": [10**5]}),
    ],
)
def test_the_limit_that_binds_and_its_time(limit, seconds, changes):
    found = predict(row(**changes), ROUND)
    assert (found.limit, found.seconds) == (limit, pytest.approx(seconds, rel=1e-12))


def test_a_prediction_does_not_fall_with_bytes_and_says_when_the_memory_binds():
    found = [predict(row(programs=1000, issued=[1000], bytes=size), ROUND) for size in range(0, 2 * 10**8, 10**6)]
    seconds = [each.seconds for each in found]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    limits = [each.limit for each in found]
    assert limits == sorted(limits) and set(limits) == {"issue slots", "memory"}


def test_a_faster_gpu_is_predicted_to_be_faster():
    streaming = row(bytes=10**9)
    assert predict(streaming, GPUS["H100"]).seconds / predict(streaming, GPUS["H200"]).seconds == pytest.approx(4.8 / 3.35)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 16),  # 64 warps
        ({"warps": 1, "registers": 24}, 32),  # programs
        ({"registers": 97}, 4),  # 104 registers of 128 threads
        ({"shared": 56 * 1024}, 3),  # 57 KiB with what the system takes
        ({"shared": 300 * 1024}, 1),  # whatever it needs
    ],
)
def test_resident_programs(changes, expected):
    assert resident(row(**changes)) == expected


def test_loops_count_with_their_trips(monkeypatch):
    monkeypatch.setitem(cost_model.TRIPS, "looping_kernel", lambda given: (given["tiles"], 4))
    looping = row(kernel="looping_kernel", arguments={"tiles": 3})
    assert per_warp(looping, [10, 20, 5]) == 10 + 3 * 20 + 3 * 4 * 5
    assert per_warp(looping, [10, 20]) == 10 + 3 * 20
    with pytest.raises(ValueError, match="looping_kernel has loops 3 deep: its entry in TRIPS is of 2"):
        per_warp(looping, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="some_kernel has loops: say in TRIPS how often each runs"):
        predict(row(issued=[1, 1]), ROUND)


def test_gains_are_of_all_launches_of_an_operator():
    rows = [
        row(bytes=4 * 10**6),  # 4 µs
        row(),  # 2 µs, a launch
        row(bytes=10**7, channels=24),  # 10 µs
        row(bytes=10**7, call="forward nhwc h=bfloat16"),
        row(bytes=10**7, call="any", operator="other"),
        row(bytes=10**7, call="coupling bf16", operator="other"),
    ]
    first = ("op", "forward nhwc h=float32", "op_forward")
    reference_times = {
        (12, *first): 8e-6, (24, *first): 40e-6, (12, "op", "forward nhwc h=bfloat16", "op_forward"): 5e-6,
        (12, "other", "any", "op_forward"): 10e-6, (12, "other", "coupling bf16", "op_forward"): 20e-6,
    }  # fmt: skip
    found = gains(rows, reference_times, ROUND)
    assert found == {
        ("op", "float32"): pytest.approx(48 / 16),
        ("op", "bfloat16"): pytest.approx(0.5),
        ("other", "any"): pytest.approx(1.0),
        ("other", "bf16"): pytest.approx(2.0),
    }


def test_the_table_calls_predictions_predictions():
    lines = table([row(bytes=10**9), row(bytes=10**9), row()], ["H100", "H200"]).splitlines()
    assert len(lines) == 3  # the same launch once
    assert lines[0].count("predicted") == 2
    assert lines[1].split()[-6:] == ["331.7", "µs", "memory", "231.5", "µs", "memory"]
    assert lines[2].split()[-3:] == ["2.0", "µs", "launch"]


def test_predicted_gains_are_of_kernels_that_wait_for_one(tmp_path):
    """What was in use before there were tables stays what it was."""
    gpu = replace(ROUND, name="Acme A1")
    predicted = {
        ("conv3x3", "bfloat16"): 1.456,
        ("conv3x3", "fp32"): 0.9,
        ("conv3x3", "tf32"): 1.7,
        ("affine", "float32"): 0.5,
        ("step_network", "any"): 2,
    }
    written = predicted_table(gpu, predicted, tmp_path)
    written.file.write_text(tuning.text(written))
    assert tuning.read(tmp_path / "acme-a1.json") == written
    found = [(choice.kernel, choice.dtype, choice.gain, choice.used) for choice in written.backends]
    assert found == [
        ("conv3x3", "bfloat16", 1.46, True),
        ("conv3x3", "float32", 0.9, False),
        ("step_network", None, 2, True),
    ]
    assert {choice.provenance["kind"] for choice in written.backends} == {"predicted"}


def test_precisions_choose_variants_of_calls():
    """Of maps of the state by the dtype of the networks' outputs: a table of one dtype is not made of another's times."""
    maps = [("forward", "nhwc", "float32"), ("forward", "nhwc", "bfloat16")]
    assert chosen([*maps, "bf16", "tf32", "fp32"], ["bf16"]) == [maps[1], "bf16"]
    assert chosen([*maps, "bf16", "tf32", "fp32"], ["tf32"]) == [maps[0], "tf32"]
    assert chosen(maps, PRECISIONS) == maps


def test_every_function_that_makes_calls_is_predicted():
    """But single convolutions of any channels, and steps of other sizes, which the tasks have in others."""
    calls = pytest.importorskip("ncsr_fast.kernels.calls")
    makers = {name for name in vars(calls) if name.endswith("_calls")}
    assert set(CALLS) == makers - {"convolution_calls", "large_coupled_calls"}


@pytest.mark.slow
@pytest.mark.skipif(not ops.backends("cuda")["triton"].available, reason="there are no Triton kernels to trace")
def test_the_reference_is_predicted_operator_by_operator():
    from ncsr_fast.benchmarks.fake_cuda import fake_cuda

    counter = cost_model._TimedCounter(ROUND)
    with fake_cuda():
        x, weight = torch.empty(10**4, 100, device="cuda"), torch.empty(100, 10**4, device="cuda")
        with counter:
            (torch.relu(x), torch.relu(x[0]), x @ weight)
    # 8 MB; a launch; 408 MB, which take longer than 20 GFLOP
    assert counter.seconds == pytest.approx(8e-6 + LAUNCH + 408e-6)
    found = cost_model.reference_seconds(replace(cost_model.TASKS["train"], batch=1, use="quick"), ROUND)
    assert {key[3] for key in found} >= {"affine_forward", "affine_backward", "flow_step_backward", "inverse_logdet"}
    named = {key[2] for key in found}
    assert named >= {"any", "forward nhwc h=float32", "forward nhwc h=bfloat16", "shared bf16", "injector fp32"}
    assert all(seconds >= LAUNCH for seconds in found.values())
