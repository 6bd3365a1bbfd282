"""Every operator on every backend this machine has: values, log-det, gradients, both directions."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import (
    EPS,
    ROUNDING,
    arguments,
    assert_close,
    cells,
    differentiable,
    directions,
    exact_dtype,
    formula,
    interpreted,
    marked,
    operators,
    run,
    where,
)
from torch import Tensor

from ncsr_fast import ops

CHANNELS = [1, 2, 5, 12, 24, 48, 96, 192, 200]


@where
def possible(name: str, channels: int, backend: str) -> bool:
    """A split needs two channels; the interpreter is slow, and tiles of 64 and of 256 channels are in other cases."""
    return not (name == "gaussian_split" and channels == 1) and not (interpreted(backend) and channels in (48, 200))


def wide(name: str, channels: int, backend: str) -> bool:
    """In the interpreter, channels that only add programs like those of fewer channels; the step has two tiles of 96."""
    return interpreted(backend) and channels >= 96 and (name, channels) != ("flow_step", 96)


@where
def in_its_dtypes(backend: str, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 or exact_dtype(backend) == torch.float64


@operators
@cells
@directions
@possible
@in_its_dtypes
@marked("exhaustive", wide)
@marked("exhaustive", lambda channels, backend, dtype: interpreted(backend) and channels >= 96 and dtype != torch.float32)
@marked("slow", lambda channels, backend: interpreted(backend) and channels != 5)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_values(name, device, backend, inverse, dtype, channels):
    state, *rest = arguments(name, channels, dtype=dtype, device=device)
    expected, expected_logdet = formula(name, state.double(), *(tensor.double() for tensor in rest), inverse=inverse)
    y, logdet = run(name, state, *rest, inverse=inverse, backend=backend)
    assert y.dtype == dtype and y.device == state.device
    assert logdet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(y, expected, ROUNDING[dtype], "y")
    scale = expected_logdet.abs() + math.sqrt(state.numel())  # of the terms, which may cancel
    tolerance = ROUNDING[torch.float64] if dtype == torch.float64 else ROUNDING[torch.float32]
    assert ((logdet.double() - expected_logdet).abs() / scale).max() < tolerance


@operators
@cells
@directions
@possible
# the step's two tiles of 96 channels are in test_memory.test_larger_than_any_tile, gradients included
@marked("exhaustive", lambda channels, backend: interpreted(backend) and channels >= 96)
@marked("slow", lambda channels, backend: interpreted(backend) and channels != 5)
@pytest.mark.parametrize("channels", CHANNELS)
def test_gradients(name, device, backend, inverse, channels):
    """Of images, conditioning and parameters, through y and through logdet, beside autograd of the definition."""
    dtype = exact_dtype(backend)
    tensors = differentiable(arguments(name, channels, size=(3, 5), dtype=dtype, device=device))
    doubles = differentiable([tensor.double() for tensor in tensors])
    expected_outputs = formula(name, *doubles, inverse=inverse)
    outputs = run(name, *tensors, inverse=inverse, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(device) for out in expected_outputs]
    expected = torch.autograd.grad(expected_outputs, doubles, weights)
    grads = torch.autograd.grad(outputs, tensors, [w.to(out.dtype) for w, out in zip(weights, outputs)])
    for index, (grad, reference, tensor) in enumerate(zip(grads, expected, tensors)):
        assert grad.dtype == tensor.dtype
        assert_close(grad, reference, 20 * ROUNDING[dtype], f"gradient {index}")  # longer sums, and derivatives of 1/scale


@operators
@cells
@directions
@marked("slow", interpreted)
def test_inverse_undoes_the_map(name, device, backend, inverse):
    dtype = exact_dtype(backend)
    state, *rest = arguments(name, 24, size=(3, 7), dtype=dtype, device=device)
    y, logdet = run(name, state, *rest, inverse=inverse, backend=backend)
    back, back_logdet = run(name, y, *rest, inverse=not inverse, backend=backend)
    assert_close(back, state, 100 * ROUNDING[dtype], "round trip")
    assert_close(back_logdet, -logdet, 10 * ROUNDING[dtype], "logdet")


@cells
@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if name != "gaussian_split"])
@directions
@marked("slow", interpreted)
@marked("exhaustive", lambda name, backend: interpreted(backend) and name != "flow_step")  # whose logdet is that of its parts
def test_logdet_is_that_of_the_jacobian(name, device, backend, inverse):
    """By autograd, on a 2×3 image, where a log-det without its H·W, or with H², is wrong."""
    dtype = exact_dtype(backend)
    state, *rest = arguments(name, channels=4, batch=1, dtype=dtype, device=device)

    def flat(x: Tensor) -> Tensor:
        return run(name, x.view(state.shape), *rest, inverse=inverse, backend=backend)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, state.flatten())
    _, logdet = run(name, state, *rest, inverse=inverse, backend=backend)
    expected = torch.linalg.slogdet(jacobian.double())[1].item()
    assert logdet.item() == pytest.approx(expected, rel=100 * ROUNDING[dtype], abs=100 * ROUNDING[dtype])


@operators
@cells
@directions
@where(lambda backend: exact_dtype(backend) == torch.float64)
def test_gradcheck(name, device, backend, inverse):
    """By finite differences, which need float64."""
    tensors = differentiable(arguments(name, channels=4, device=device))
    assert torch.autograd.gradcheck(lambda *t: run(name, *t, inverse=inverse, backend=backend), tensors)


@operators
@cells
@directions
@marked("slow", interpreted)
def test_gradient_of_a_gradient(name, device, backend, inverse):
    """Plain torch computes it whatever the backend, so it is right and not merely refused."""
    dtype = exact_dtype(backend)
    if dtype == torch.float64:
        tensors = differentiable(arguments(name, channels=2, size=(1, 2), batch=1, device=device))
        assert torch.autograd.gradgradcheck(lambda *t: run(name, *t, inverse=inverse, backend=backend), tensors)
    else:
        tensors = differentiable(arguments(name, channels=2, size=(1, 2), batch=1, dtype=dtype, device=device))
        results = []
        for which in (backend, "reference"):
            y, logdet = run(name, *tensors, inverse=inverse, backend=which)
            first = torch.autograd.grad(y.square().sum() + logdet.sum(), tensors, create_graph=True)
            results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors))
        for value, expected in zip(*results):
            assert_close(value, expected, 100 * ROUNDING[dtype], "second gradient")


@cells
def test_gradient_of_a_gradient_where_h_depends_on_z(device, backend):
    """As in a flow: the second gradient must take each way from z once."""
    dtype = exact_dtype(backend)
    z = arguments("affine_coupling", channels=4, size=(1, 2), batch=1, dtype=dtype, device=device)[0].requires_grad_()
    results = []
    for which in (backend, "reference"):
        y, logdet = ops.affine_coupling(z, torch.cat([z[:, :2], z[:, :2].sin()], dim=1), backend=which)
        (first,) = torch.autograd.grad(y.square().sum() + logdet.sum(), z, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), z)[0])
    assert_close(*results, 100 * ROUNDING[dtype], "second gradient")


@operators
@cells
@marked("slow", interpreted)
def test_torch_func_and_batched_gradients(name, device, backend):
    """vmap over samples of a batch of batches, and a Jacobian by batched gradients: plain torch, the same numbers."""
    dtype = exact_dtype(backend)
    state, *rest = arguments(name, channels=4, size=(1, 2), batch=1, dtype=dtype, device=device)
    several = torch.stack([state, 2 * state])
    y, logdet = torch.func.vmap(lambda z: run(name, z, *rest, backend=backend))(several)
    for index in (0, 1):
        expected, expected_logdet = run(name, several[index], *rest, backend=backend)
        assert_close(y[index], expected, 20 * ROUNDING[dtype], "y")
        assert_close(logdet[index], expected_logdet, 20 * ROUNDING[dtype], "logdet")
    jacobians = [
        torch.autograd.functional.jacobian(lambda z: run(name, z, *rest, backend=backend)[0], state, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    assert_close(*jacobians, 20 * ROUNDING[dtype], "jacobian")


@cells
def test_only_what_needs_a_gradient_gets_one(device, backend):
    z, h = arguments("affine_injector", dtype=torch.float32, device=device)
    y, _ = ops.affine_injector(z, h.requires_grad_(), backend=backend)
    y.sum().backward()
    assert z.grad is None and h.grad is not None
    assert not ops.affine_injector(z, h.detach(), backend=backend)[0].requires_grad


@cells
@pytest.mark.parametrize("without", ["h_coupling", "h_injector"])
@directions
@marked("slow", interpreted)
def test_flow_step_without_a_part(device, backend, without, inverse):
    dtype = exact_dtype(backend)
    z, coupling, bias, logs, weight, injector = differentiable(arguments("flow_step", dtype=dtype, device=device))
    parts = {"h_coupling": coupling, "h_injector": injector, without: None}
    chain = [("affine_coupling", parts["h_coupling"]), ("actnorm_invconv", None), ("affine_injector", parts["h_injector"])]
    expected, logdets = z, []
    for name, h in reversed(chain) if inverse else chain:
        if h is None and name != "actnorm_invconv":
            continue
        rest = (bias, logs, weight) if h is None else (h,)
        expected, logdet = run(name, expected, *rest, inverse=inverse, backend="reference")
        logdets.append(logdet)
    y, logdet = ops.flow_step(z, bias=bias, logs=logs, weight=weight, inverse=inverse, backend=backend, **parts)
    assert_close(y, expected, 20 * ROUNDING[dtype], "y")
    assert_close(logdet, sum(logdets), 20 * ROUNDING[dtype], "logdet")
    wanted = [tensor for tensor in (z, bias, logs, weight, *parts.values()) if tensor is not None]
    grads = torch.autograd.grad(y.sin().sum() + logdet.sum(), wanted)
    for grad, reference in zip(grads, torch.autograd.grad(expected.sin().sum() + sum(logdets).sum(), wanted)):
        assert_close(grad, reference, 100 * ROUNDING[dtype], "gradient")


@cells
@directions
def test_saturated_scales(device, backend, inverse):
    """raw of ±30: the scale is eps or 1 + eps, its log exact, nothing overflows, gradients stay finite."""
    z = torch.full((1, 2, 1, 1), 1e6, device=device, requires_grad=True)
    h = torch.tensor([0.0, -30.0, 0.0, 30.0], device=device).view(1, 4, 1, 1).requires_grad_()
    y, logdet = ops.affine_injector(z, h, inverse=inverse, backend=backend)
    sign = -1 if inverse else 1
    assert logdet.item() == pytest.approx(sign * math.log(EPS), rel=1e-4)
    assert y.flatten().tolist() == pytest.approx([1e6 * EPS**sign, 1e6], rel=2e-4)
    for grad in torch.autograd.grad(y.sum() + logdet.sum(), (z, h)):
        assert grad.isfinite().all()


@operators
@cells
def test_what_is_not_finite_stays_visible(name, device, backend):
    """One NaN pixel makes its own sample's log-det or value NaN, and no other's."""
    state, *rest = arguments(name, channels=6, dtype=torch.float32, device=device)
    state[0, -1, 1, 2] = float("nan")
    if name != "actnorm_invconv":
        rest[-1][0, -1, 1, 2] = float("nan")
    y, logdet = run(name, state, *rest, backend=backend)
    assert y[0].isnan().any() and y[1].isfinite().all() and logdet[1].isfinite()
    assert name == "actnorm_invconv" or logdet[0].isnan()
