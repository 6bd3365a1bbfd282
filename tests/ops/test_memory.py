"""What the operators do with memory: layouts, sizes, unwritten elements, the same bits every time."""

from __future__ import annotations

import os

import pytest
import torch
from layouts import laid_out
from operator_cases import (
    ROUNDING,
    arguments,
    assert_close,
    cells,
    differentiable,
    directions,
    exact_dtype,
    interpreted,
    marked,
    operators,
    run,
    where,
)

from ncsr_fast import layout, ops
from ncsr_fast.ops.backend import kernels


def assert_like_the_reference(name: str, tensors: list[torch.Tensor], backend: str, inverse: bool = False) -> None:
    dtype = tensors[0].dtype
    expected, expected_logdet = run(name, *tensors, inverse=inverse, backend="reference")
    y, logdet = run(name, *tensors, inverse=inverse, backend=backend)
    assert_close(y, expected, 20 * ROUNDING[dtype], "y")
    assert_close(logdet, expected_logdet, 20 * ROUNDING[dtype], "logdet")
    grads = torch.autograd.grad(y.square().sum() + logdet.sum(), tensors)
    references = torch.autograd.grad(expected.square().sum() + expected_logdet.sum(), tensors)
    for grad, reference in zip(grads, references):
        assert_close(grad, reference, 100 * ROUNDING[dtype], "gradient")


@operators
@cells
@pytest.mark.parametrize(
    "size, batch", [((1, 1), 1), ((5, 3), 1), ((1, 67), 2), ((67, 1), 1), ((2, 2), 0), ((0, 3), 2)], ids=str
)
@marked("slow", lambda backend, size: interpreted(backend) and max(size) > 5)
def test_sizes(name, device, backend, size, batch):
    dtype = exact_dtype(backend)
    tensors = differentiable(arguments(name, channels=6, size=size, batch=batch, dtype=dtype, device=device))
    assert_like_the_reference(name, tensors, backend)


@cells
@directions
@pytest.mark.parametrize("channels", [12, 96])
@marked("slow", interpreted)
@marked("exhaustive", lambda backend, inverse, channels: interpreted(backend) and inverse is (channels == 12))
def test_larger_than_any_tile(device, backend, inverse, channels):
    """Several tiles, parts and threads, with a remainder."""
    dtype = exact_dtype(backend)
    size, batch = (37, 45), 3
    if interpreted(backend):  # slowly: two tiles of 32 pixels, by two of 64 channels where there are 96
        size, batch = ((9, 13), 2) if channels == 12 else ((5, 7), 1)
    tensors = differentiable(arguments("flow_step", channels=channels, size=size, batch=batch, dtype=dtype, device=device))
    assert_like_the_reference("flow_step", tensors, backend, inverse)


@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if name != "actnorm_invconv"])  # it has no network
@cells
@pytest.mark.parametrize("h_dtype", [torch.bfloat16, torch.float16], ids=str)
@marked("slow", interpreted)
def test_float32_state_with_half_precision_networks(name, device, backend, h_dtype):
    """What a network in bf16 hands over is rounded once, by the network; the state stays float32."""
    tensors = arguments(name, channels=12, dtype=torch.float32, device=device)
    tensors = [x.to(h_dtype) if index and x.dim() == 4 else x for index, x in enumerate(tensors)]
    tensors = differentiable(tensors)
    exact = differentiable([x.detach().double() for x in tensors])
    y, logdet = run(name, *tensors, backend=backend)
    expected, expected_logdet = run(name, *exact, backend="reference")
    assert y.dtype == torch.float32
    assert_close(y, expected, ROUNDING[torch.float32], "y")
    assert_close(logdet, expected_logdet, ROUNDING[torch.float32], "logdet")
    grads = torch.autograd.grad(y.sum() + logdet.sum(), tensors)
    for grad, x, reference in zip(grads, tensors, torch.autograd.grad(expected.sum() + expected_logdet.sum(), exact)):
        assert grad.dtype == x.dtype
        assert_close(grad, reference, 10 * ROUNDING[x.dtype], "gradient")


@operators
@cells
@directions
@pytest.mark.parametrize("way", ["contiguous", "channels_last"])
@marked("slow", interpreted)
@marked("exhaustive", lambda backend, inverse, way: interpreted(backend) and inverse is (way == "contiguous"))
def test_every_element_is_written(name, device, backend, inverse, way, monkeypatch):
    """Whatever torch hands out uninitialised is NaN here."""
    tensors = differentiable(arguments(name, 12, size=(5, 7), dtype=torch.float32, device=device))
    tensors = [laid_out(tensor, way) for tensor in tensors]
    for allocate in ("empty", "empty_like"):
        monkeypatch.setattr(torch, allocate, _poisoned(getattr(torch, allocate)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    y, logdet = run(name, *tensors, inverse=inverse, backend=backend)
    assert y.isfinite().all() and logdet.isfinite().all()
    for grad in torch.autograd.grad(y.sum() + logdet.sum(), tensors):
        assert grad.isfinite().all()


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


@operators
@cells
@where(lambda device, backend: (device, backend) != ("cpu", "reference"))  # PyTorch divides its sums by the threads
@marked("slow", interpreted)
@marked("exhaustive", lambda name, backend: interpreted(backend) and name != "flow_step")  # which has all of their sums
def test_same_bits_every_time_whatever_the_threads(name, device, backend):
    size = (40, 50) if not interpreted(backend) else (9, 10)
    tensors = differentiable(arguments(name, 12, size=size, batch=2, dtype=torch.float32, device=device))
    threads = torch.get_num_threads()

    def everything() -> list[torch.Tensor]:
        y, logdet = run(name, *tensors, backend=backend)
        return [y, logdet, *torch.autograd.grad(y.square().sum() + logdet.sum(), tensors)]

    first = everything()
    try:
        for count in (1, 3, threads):
            torch.set_num_threads(count)
            for value, again in zip(first, everything()):
                assert torch.equal(value, again)
    finally:
        torch.set_num_threads(threads)


@cells
@where(lambda backend: backend != "reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_two_to_the_31_elements(device, backend, dtype, monkeypatch):
    """The second sample lies 2³¹ elements after the first, in memory that is reserved and hardly touched."""
    z, h = arguments("affine_coupling", channels=6, dtype=dtype, device=device)
    far = torch.empty(2**31 + 10_000, dtype=dtype, device=device)
    if device == "cpu" and far.untyped_storage().nbytes() > _available_memory() / 2:
        pytest.skip("not enough memory to reserve")
    affine_forward = kernels(backend).affine_forward

    def distant(x):
        return far.as_strided(x.shape, (2**31, *x.contiguous().stride()[1:]))

    expected, expected_logdet = affine_forward(z, h, 3, 1e-4, False)
    wide = distant(z).copy_(z)
    for value, reference in zip(affine_forward(wide, h, 3, 1e-4, False), (expected, expected_logdet)):
        assert torch.equal(value, reference)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: distant(x))
    y, _ = affine_forward(z, h, 3, 1e-4, False)
    assert y.stride(0) == 2**31 and torch.equal(y, expected)


def _available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_empty_like_keeps_the_layout_and_nothing_else():
    x = torch.rand(2, 6, 3, 4)
    assert layout.empty_like(x[:, 2:]).is_contiguous()
    assert layout.empty_like(x.to(memory_format=torch.channels_last)[:, 2:]).is_contiguous(memory_format=torch.channels_last)
    assert layout.empty_like(x.transpose(2, 3)).is_contiguous()
    assert layout.empty_like(x, torch.bfloat16).dtype == torch.bfloat16
