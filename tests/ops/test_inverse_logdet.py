"""Inverse and log|det| on every backend this machine has, beside LAPACK's by NumPy, which is another library than PyTorch's."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from operator_cases import assert_close, cells, interpreted, marked, where
from torch import Tensor

from ncsr_fast import ops
from ncsr_fast.ops.inverse_logdet import invert

CHANNELS = [1, 2, 3, 5, 12, 24, 48, 96, 192]
NAME = "inverse_logdet"
EPSILON = torch.finfo(torch.float64).eps


def matrices(channels: int, count: int = 3, device: str = "cpu", seed: int = 0) -> Tensor:
    """Matrices that need their rows exchanged."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, channels, generator=generator, dtype=torch.float64).to(device)


def expected_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = weight.detach().double().cpu().numpy()
    return torch.from_numpy(np.linalg.inv(values)), torch.from_numpy(np.linalg.slogdet(values)[1])


def assert_inverse(inverse: Tensor, weight: Tensor) -> None:
    """Backward stability: |W⁻¹·W - 1| is rounding times the condition number (Higham, Accuracy and Stability, 14.1)."""
    weight = weight.detach().double().cpu()
    residual = inverse.detach().cpu() @ weight - torch.eye(weight.shape[-1], dtype=torch.float64)
    allowed = weight.shape[-1] * EPSILON * np.linalg.cond(weight.numpy(), np.inf)
    assert (residual.abs().amax(dim=(1, 2)).numpy() <= allowed).all()


@cells
@marked("exhaustive", lambda backend, channels: interpreted(backend) and channels > 24)  # which has several tiles
@pytest.mark.parametrize("channels", CHANNELS)
@marked("slow", interpreted)
def test_values(device, backend, channels):
    weight = matrices(channels, count=1 if interpreted(backend) and channels > 24 else 3, device=device)
    inverse, logdet = ops.inverse_logdet(weight, backend=backend)
    assert inverse.dtype == logdet.dtype == torch.float64 and inverse.device == logdet.device == weight.device
    assert inverse.is_contiguous()
    assert_inverse(inverse, weight)
    assert_close(logdet, expected_of(weight)[1], 1e-12, "log|det|")


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lesser_dtypes_are_inverted_in_float64(device, backend, dtype):
    weight = matrices(5, device=device).to(dtype)
    inverse, logdet = ops.inverse_logdet(weight, backend=backend)
    assert inverse.dtype == logdet.dtype == torch.float64
    assert_inverse(inverse, weight)
    assert_close(logdet, expected_of(weight)[1], 1e-12, "log|det|")


@cells
def test_gradients(device, backend):
    weight = matrices(5, device=device).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = (
        torch.randn(3, 5, 5, generator=generator, dtype=torch.float64).to(device),
        torch.arange(1.0, 4.0).double().to(device),
    )
    (found,) = torch.autograd.grad(ops.inverse_logdet(weight, backend=backend), weight, weights)
    (expected,) = torch.autograd.grad((torch.linalg.inv(weight), torch.linalg.slogdet(weight)[1]), weight, weights)
    assert_close(found, expected, 1e-11, "gradient")
    if not interpreted(backend):  # the backward pass is the same for all
        assert torch.autograd.gradcheck(lambda w: ops.inverse_logdet(w, backend=backend), weight)
        assert torch.autograd.gradgradcheck(lambda w: ops.inverse_logdet(w, backend=backend), weight)


@cells
def test_a_gradient_of_float32_weights_is_float32(device, backend):
    weight = matrices(4, device=device).float().requires_grad_()
    ops.inverse_logdet(weight, backend=backend)[1].sum().backward()
    assert weight.grad.dtype == torch.float32
    assert_close(weight.grad, expected_of(weight)[0].transpose(1, 2), 1e-6, "gradient")


@cells
@marked("slow", interpreted)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "negated"])
def test_layouts(device, backend, layout):
    weight = matrices(6, count=4, device=device)
    lying = {
        "transposed": lambda: weight.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda: torch.stack([weight, weight + 1], dim=-1)[..., 0],
        "expanded": lambda: weight[:1].expand(4, -1, -1),
        "negated": lambda: torch._neg_view(-weight),
    }[layout]()
    dense = lying.resolve_neg().clone(memory_format=torch.contiguous_format)
    for found, expected in zip(ops.inverse_logdet(lying, backend=backend), ops.inverse_logdet(dense, backend=backend)):
        assert_close(found, expected, 1e-12, "result")


@cells
@marked("slow", interpreted)
def test_the_same_bits_every_time(device, backend):
    """And whatever the number of matrices and of threads."""
    weight, threads = matrices(12, count=5, device=device), torch.get_num_threads()
    inverse, logdet = ops.inverse_logdet(weight, backend=backend)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            several = ops.inverse_logdet(weight[1 : 1 + count], backend=backend)
            assert torch.equal(several[0], inverse[1 : 1 + count]) and torch.equal(several[1], logdet[1 : 1 + count])
    finally:
        torch.set_num_threads(threads)


@cells
def test_no_matrices(device, backend):
    weight = torch.empty(0, 4, 4, device=device, requires_grad=True)
    inverse, logdet = ops.inverse_logdet(weight, backend=backend)
    (gradient,) = torch.autograd.grad(inverse.sum() + logdet.sum(), weight)
    assert inverse.shape == gradient.shape == (0, 4, 4) and logdet.shape == (0,)


def without_inverse(kind: str) -> Tensor:
    """Two matrices, of which the second has no inverse with a correct digit."""
    weight = matrices(6, count=2)
    if kind == "near singular":
        weight[1, :, 2] = weight[1, :, 4] * (1 + EPSILON)
        weight[1, 0, 2] *= 1 + 4 * EPSILON
    else:
        weight[1, :, 2] = {"singular": 0.0, "nan": math.nan, "infinite": math.inf}[kind]
    return weight


@cells
@marked("slow", interpreted)
@pytest.mark.parametrize("kind", ["singular", "near singular", "nan", "infinite"])
def test_a_matrix_without_an_inverse(device, backend, kind):
    """Is named on the CPU, and NaN where reading it would make the host wait; the others are not touched."""
    weight = without_inverse(kind).to(device)
    with np.errstate(all="ignore"):  # in the interpreter, which is NumPy
        if device == "cpu":
            with pytest.raises(ValueError, match="inverse_logdet: matrix 1: weight is singular or not finite"):
                ops.inverse_logdet(weight, backend=backend)
        else:
            inverse = ops.inverse_logdet(weight, backend=backend)[0]
            assert inverse[1].isnan().all() and inverse[0].isfinite().all()
        logdet = invert(weight, NAME, needs_inverse=False, backend=backend)[1]
    expected = expected_of(weight[:1])[1]
    assert_close(logdet[:1], expected, 1e-12, "log|det| of the other")
    if kind == "singular":
        assert logdet[1].item() == -math.inf
    else:
        assert not logdet[1].isfinite() if kind != "near singular" else logdet[1] < expected[0] - 25


@cells
def test_an_inverse_that_is_not_read_is_nan(device, backend, monkeypatch):
    """As on a GPU, which may not be waited for."""
    monkeypatch.setattr(sys.modules[invert.__module__], "reading_is_free", lambda tensor: False)
    for kind in ("singular", "near singular"):
        with np.errstate(all="ignore"):
            inverse = ops.inverse_logdet(without_inverse(kind).to(device), backend=backend)[0]
        assert inverse[1].isnan().all() and inverse[0].isfinite().all()


def test_arguments():
    with pytest.raises(TypeError, match="inverse_logdet: weight must be a tensor, not list"):
        ops.inverse_logdet([[1.0]])
    for shape in ((4, 4), (1, 4, 5), (2, 0, 0), (1, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"inverse_logdet: weight must have shape \("):
            ops.inverse_logdet(torch.ones(shape))
    with pytest.raises(TypeError, match="inverse_logdet: weight must be a floating-point tensor, not torch.int64"):
        ops.inverse_logdet(torch.ones(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="inverse_logdet: backend must be one of 'auto', 'reference'"):
        ops.inverse_logdet(torch.ones(1, 1, 1), backend="fast")
    assert ops.inverse_logdet(torch.ones(1, 2, 2, device="meta"))[0].shape == (1, 2, 2)


registered = where(lambda backend: backend != "reference")  # which is plain PyTorch


@cells
@registered
@pytest.mark.parametrize("transposed", [False, True])
@marked("slow", lambda backend, transposed: interpreted(backend) or transposed)
def test_opcheck(device, backend, transposed):
    """Its strides too, which inductor relies on."""
    weight = matrices(5, device=device)
    weight = (weight.transpose(1, 2) if transposed else weight).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.ncsr_fast.inverse_logdet.default, (weight, NAME, True, backend), test_utils=tests)
    given = torch.ones(3, 5, 5, device=device).double(), torch.ones(3, device=device).double(), weight.detach(), weight.detach()
    backward = torch.ops.ncsr_fast.inverse_logdet_backward.default
    torch.library.opcheck(backward, (*given, [True], NAME, True, backend), test_utils=("test_schema", "test_faketensor"))


@cells
@registered
@where(lambda backend: not interpreted(backend))
@pytest.mark.slow
def test_compiled(device, backend):
    """One opaque operator, which refuses on the CPU what an eager call does."""
    weight = matrices(5, device=device).requires_grad_()

    def loss(w: Tensor) -> Tensor:
        inverse, logdet = ops.inverse_logdet(w, backend=backend)
        return inverse.sin().sum() + logdet.sum()

    compiled = torch.compile(loss, fullgraph=True)
    eager, traced = (torch.autograd.grad(function(weight), weight)[0] for function in (loss, compiled))
    assert_close(traced, eager, 1e-11, "gradient")
    if device == "cpu":
        with pytest.raises(ValueError, match="matrix 1: weight is singular"):
            compiled(without_inverse("singular")[:, :5, :5].contiguous())


@cells
def test_vmap(device, backend):
    weight = matrices(4, count=6, device=device).view(2, 3, 4, 4)
    inverse, logdet = torch.func.vmap(lambda w: ops.inverse_logdet(w, backend=backend))(weight)
    for index in (0, 1):
        expected = ops.inverse_logdet(weight[index], backend=backend)
        assert_close(inverse[index], expected[0], 1e-12, "inverse")
        assert_close(logdet[index], expected[1], 1e-12, "log|det|")


@cells
@where(lambda backend: backend == "native")
def test_after_a_change_of_the_number_of_threads(device, backend):
    """PyTorch's LU of 192 channels was seen to be wrong from then on, without an error (MKL, torch 2.13, AMD)."""
    weight, threads = matrices(192, device=device), torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            inverse, logdet = ops.inverse_logdet(weight, backend=backend)
            assert_inverse(inverse, weight)
            assert_close(logdet, expected_of(weight)[1], 1e-12, "log|det|")
    finally:
        torch.set_num_threads(threads)
