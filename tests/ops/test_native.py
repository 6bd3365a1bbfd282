"""The compiled module on the CPU: every instruction set it was built for, its threads, its folding of parameters."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import installation
import pytest
import torch
from operator_cases import ROUNDING, arguments, assert_close, differentiable, directions, formula, operators, run
from support import fresh_process

from ncsr_fast.ops import _fold

if not installation.expects("native"):
    pytest.skip("the native backend is not among the cells", allow_module_level=True)

from ncsr_fast import _native
from ncsr_fast.ops import _native as calls


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
        for grad, reference in zip(grads, references):
            assert_close(grad, reference, 20 * ROUNDING[dtype], "gradient")


def test_half_precision_is_rounded_to_nearest_even(instruction_set):
    """Every float16 and bfloat16 there is, through a map that changes nothing but the format."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = every.view(1, 1, 256, 256)
        y, _ = calls.step_fwd(x, torch.ones(1, 1), torch.zeros(1), None, None, 1.0, False)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(), (x.float() + 0.0).to(dtype).nan_to_num())
        for factor in (1 / 3, 1.5):  # the latter makes a tie of every odd mantissa
            scaled = calls.step_fwd(x, torch.full((1, 1), factor), torch.zeros(1), None, None, 1.0, False)[0]
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
    calls._launch(lambda *values: passed.extend(values), x, lambda: 16, "sizes")
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


@directions
@pytest.mark.parametrize("channels", [1, 7, 12, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_folding_is_that_of_torch(inverse, channels, dtype):
    _, bias, logs, weight = arguments("actnorm_invconv", channels, dtype=dtype)
    weight = weight.T.contiguous().T  # read as it lies
    generator = torch.Generator().manual_seed(0)
    dmix, doffset = torch.randn(channels, channels, generator=generator), torch.randn(channels, generator=generator)
    dlogdet = torch.tensor(3.0, dtype=torch.float64)
    for function, arguments_of in (
        ("fold", ("test", bias, logs, weight, inverse, dtype)),
        ("fold_backward", (bias, logs, weight, inverse, dmix.to(dtype), doffset.to(dtype), dlogdet)),
    ):
        for value, expected in zip(getattr(calls, function)(*arguments_of), getattr(_fold, function)(*arguments_of)):
            tolerance = 1e-6 if dtype == torch.float32 else 1e-12
            assert_close(torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(expected), tolerance, function)
