"""The compiled module on the CPU: every instruction set it was built for, its threads, its folding of parameters."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import installation
import pytest
import torch
from operator_cases import (
    ROUNDING,
    WIDEST,
    arguments,
    assert_close,
    differentiable,
    directions,
    formula,
    marked,
    operators,
    run,
)
from support import fresh_process
from torch import Tensor

if not installation.expects("native"):
    pytest.skip("the native backend is not among the cells", allow_module_level=True)

from ncsr_fast import _native
from ncsr_fast.ops import native as calls
from ncsr_fast.ops import passing, reference


@pytest.mark.slow
def test_the_widest_instruction_set_is_chosen_at_import(tmp_path):
    code = "from ncsr_fast import _native; print(_native.instruction_set() == _native.instruction_sets()[0])"
    assert fresh_process(code, tmp_path) == "True"
    assert _native.instruction_sets()[-1] == "baseline"
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _native.use_instruction_set("sse9")


@operators
@directions
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("way", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_every_instruction_set(instruction_set, name, inverse, dtype, way):
    """Odd sizes around the vectors' lengths, forward and backward."""
    for channels, size in ((5, (3, 11)), (12, (9, 33)), (40, (2, 17))):
        tensors = differentiable(arguments(name, channels, size=size, dtype=dtype))
        tensors = [x.detach().to(memory_format=way).requires_grad_() if x.dim() == 4 else x for x in tensors]
        doubles = differentiable([tensor.double() for tensor in tensors])
        y, logdet = run(name, *tensors, inverse=inverse, backend="native")
        expected, expected_logdet = formula(name, *doubles, inverse=inverse)
        assert_close(y, expected, ROUNDING[dtype], "y")
        grads = torch.autograd.grad(y.sum() + logdet.sum(), tensors)
        references = torch.autograd.grad(expected.sum() + expected_logdet.sum(), doubles)
        for grad, right in zip(grads, references):
            assert_close(grad, right, 20 * ROUNDING[dtype], "gradient")


def test_half_precision_is_rounded_to_nearest_even(instruction_set):
    """Every float16 and bfloat16 there is, through a map that changes nothing but the format."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = every.view(1, 1, 256, 256)
        y, _ = calls.flow_step_forward(x, torch.ones(1, 1), torch.zeros(1), None, None, 1.0, False)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(), (x.float() + 0.0).to(dtype).nan_to_num())
        for factor in (1 / 3, 1.5):  # the latter makes a tie of every odd mantissa
            scaled = calls.flow_step_forward(x, torch.full((1, 1), factor), torch.zeros(1), None, None, 1.0, False)[0]
            assert torch.equal(scaled.nan_to_num(), (x.float() * torch.tensor(factor)).to(dtype).nan_to_num())


@pytest.mark.slow
def test_threads_are_those_of_torch(tmp_path):
    """One thread makes none; three make two, however often."""
    code = """
import torch
from ncsr_fast import ops
def threads():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("Threads:"))
z, h = torch.randn(2, 12, 100, 100), torch.randn(2, 24, 100, 100)
torch.set_num_threads(1)
before = threads()
ops.affine_injector(z, h, backend="native")
alone = threads() - before
torch.set_num_threads(3)  # which itself starts some in an older torch
before = threads()
for _ in range(3):
    ops.affine_injector(z, h, backend="native")
    torch.sin(z)  # torch's own threads are the same ones
print(alone, threads() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    assert fresh_process(code, tmp_path).split() in (["0", "2"], ["0", "0"])  # none at all in a build without OpenMP


@pytest.mark.slow
def test_the_cpu_backend_does_not_ask_for_a_gpu(tmp_path):
    """The question would initialise CUDA, which a child forked afterwards, a worker of a loader, could not use then."""
    code = """
from ncsr_fast import _native
asked = []
_native.cuda_unavailable = lambda: asked.append(1) or "there is none"
import torch
from ncsr_fast import ops
z, h = torch.randn(2, 12, 4, 4), torch.randn(2, 24, 4, 4)
ops.affine_injector(z, h), ops.affine_injector(z, h, backend="native"), ops.backends("cpu")
print(len(asked), ops.backends("cuda")["native"].reason, len(asked))
"""
    assert fresh_process(code, tmp_path, CUDA_VISIBLE_DEVICES="") == "0 there is none 1"


def test_a_launch_names_device_and_stream(monkeypatch):
    """A GPU's ordinal and torch's current stream there, which is all that the compiled module knows of torch's GPUs."""
    x, empty = SimpleNamespace(device=torch.device("cuda", 3), dtype=torch.float32), torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=40 + device.index))
    passed = []
    passing._launch(lambda *values: passed.extend(values), x, lambda: 16, "sizes")
    sizes, float64, (cuda, ordinal, stream, memory) = passed
    assert (sizes, float64, cuda, ordinal, stream) == ("sizes", False, 1, 3, 43) and memory


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@operators
def test_another_gpu_than_the_current_one(name):
    tensors = arguments(name, 12, dtype=torch.float32)
    y, logdet = run(name, *(tensor.to("cuda:1") for tensor in tensors), backend="native")
    expected, expected_logdet = formula(name, *(tensor.double() for tensor in tensors))
    assert y.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
    assert_close(y, expected, ROUNDING[torch.float32], "y")
    assert_close(logdet, expected_logdet, 20 * ROUNDING[torch.float32], "logdet")


def stack_of_maps(count: int, channels: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """bias, logs and weight, and gradients of mix, offset and log-det: invertible, and of strides that are not dense."""
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = torch.linalg.qr(normal(count, channels, channels))[0] + 0.1 / channels * normal(count, channels, channels)
    bias, logs = normal(2, channels, count).permute(0, 2, 1)
    maps = [bias, 0.3 * logs, weight.mT]
    grads = [normal(channels, count, channels).transpose(0, 1), normal(count, channels), normal(count, 2)[:, 0]]
    return [tensor.to(dtype) for tensor in maps], [tensor.to(dtype) for tensor in grads]


@directions
@marked("slow", lambda instruction_set, channels: instruction_set != WIDEST or channels == 96)
@marked("exhaustive", lambda instruction_set, channels: instruction_set != WIDEST and channels == 96)  # 12 has no remainder too
@pytest.mark.parametrize("channels", [1, 7, 12, 96])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_stack_of_maps_folds_as_each_map_alone(instruction_set, threads, inverse, channels, dtype):
    """To the same bits at any number of threads, and to rounding as PyTorch in float64."""
    count = 18
    maps, grads = stack_of_maps(count, channels, dtype)
    doubles, double_grads = [x.double() for x in maps], [x.double() for x in grads]
    for function, tensors, expected in (
        (
            lambda *x: calls.fold_forward("weight {}", *x, inverse, dtype),
            maps,
            reference.fold_forward("weight {}", *doubles, inverse, torch.float64),
        ),
        (
            lambda *x: calls.fold_backward(*x[:3], inverse, *x[3:]),
            [*maps, *grads],
            reference.fold_backward(*doubles, inverse, *double_grads),
        ),
    ):
        threads(1)
        alone = [function(*each) for each in zip(*tensors)]
        for number in (1, 2):
            threads(number)
            stacked = function(*tensors)
            for index, result in enumerate(alone):
                assert all(map(torch.equal, (x[index] for x in stacked), result)), (number, index)
        for value, right in zip(stacked, expected):
            assert_close(value, right, ROUNDING[dtype], "fold")


def test_folding_without_log_determinants():
    """The log-det is that of the actnorms alone then, and a singular weight is no mistake unless its inverse is needed."""
    (bias, logs, weight), _ = stack_of_maps(3, 5, torch.float64)
    weight[1] = 0
    mix, offset, logdet = calls.fold_forward("weight {}", bias, logs, weight, False, torch.float64, needs_logdet=False)
    assert_close(mix, weight * torch.exp(logs)[:, None], ROUNDING[torch.float64], "mix")
    assert_close(offset, torch.einsum("nij,nj->ni", mix, bias), ROUNDING[torch.float64], "offset")
    assert_close(logdet, logs.sum(dim=1), ROUNDING[torch.float64], "logdet")
    assert calls.fold_forward("weight {}", bias, logs, weight, False, torch.float64)[2][1] == -torch.inf
    with pytest.raises(ValueError, match="weight 1: weight is singular"):
        calls.fold_forward("weight {}", bias, logs, weight, True, torch.float64)
    empty = calls.fold_forward("weight {}", bias[:0], logs[:0], weight[:0], True, torch.float64)
    assert [tuple(x.shape) for x in empty] == [(0, 5, 5), (0, 5), (0,)]
