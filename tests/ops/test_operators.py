"""Every operator on every backend this machine has: the formula, both directions, log-det, gradients, bad calls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ncsr_fast import ops

EPS = 1e-4
BACKENDS = [name for name, backend in ops.backends().items() if backend.available]


def arguments(name: str, channels: int = 6, size=(2, 3), batch: int = 2, dtype=torch.float64) -> tuple[Tensor, ...]:
    """The state and the other tensors of a call."""
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    state = normal(batch, channels, *size)
    if name == "actnorm_invconv":
        mixing = torch.linalg.qr(normal(channels, channels).double())[0] + 0.1 * normal(channels, channels).double()
        return state, normal(channels), 0.3 * normal(channels), mixing.to(dtype)
    outputs = {"affine_injector": channels, "affine_coupling": channels - channels // 2, "gaussian_split": channels // 2}
    return state, normal(batch, 2 * outputs[name], *size)


def formula(name: str, state: Tensor, *rest: Tensor) -> Tensor:
    """The map, written pixel by pixel from the definition."""
    if name == "actnorm_invconv":
        bias, logs, weight = rest
        return torch.einsum("oc,bchw->bohw", weight, (state + bias[:, None, None]) * logs.exp()[:, None, None])
    (h,) = rest
    first, second = h[:, 0::2], h[:, 1::2]
    if name == "gaussian_split":
        kept = state.shape[1] - first.shape[1]
        return torch.cat([state[:, :kept], (state[:, kept:] - first) / second.exp()], dim=1)
    kept = state.shape[1] - first.shape[1]
    scale = 1 / (1 + torch.exp(-second - 2)) + EPS
    return torch.cat([state[:, :kept], (state[:, kept:] + first) * scale], dim=1)


cells = pytest.mark.parametrize("backend", BACKENDS)
operators = pytest.mark.parametrize("name", ops.OPERATORS)
# what rounding may do to a float32, float16 or bfloat16 result of the sizes here, from a float64 oracle
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@operators
@cells
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("channels", [2, 5, 12, 24, 96])
def test_forward_and_inverse(name, backend, dtype, channels):
    state, *rest = arguments(name, channels, dtype=dtype)
    expected = formula(name, state.double(), *(tensor.double() for tensor in rest))
    y, logdet = getattr(ops, name)(state, *rest, backend=backend)
    assert y.dtype == dtype and y.shape == state.shape
    assert logdet.shape == (2,) and logdet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (y.double() - expected).abs().max() < ROUNDING[dtype] * (1 + expected.abs().max())
    if dtype.itemsize >= 4:
        back, inverse_logdet = getattr(ops, name)(y, *rest, inverse=True, backend=backend)
        assert (back - state).abs().max() < 100 * ROUNDING[dtype]
        assert torch.allclose(inverse_logdet, -logdet, rtol=1e-4 if dtype == torch.float32 else 1e-10)


@cells
@pytest.mark.parametrize("name", [name for name in ops.OPERATORS if name != "gaussian_split"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_logdet_is_that_of_the_jacobian(name, backend, inverse):
    """By autograd, on a 2×3 image, where a log-det without its H·W, or with H², is wrong."""
    state, *rest = arguments(name, channels=4, batch=1)

    def flat(x: Tensor) -> Tensor:
        return getattr(ops, name)(x.view(state.shape), *rest, inverse=inverse, backend=backend)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, state.flatten())
    _, logdet = getattr(ops, name)(state, *rest, inverse=inverse, backend=backend)
    assert logdet.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-10)


@cells
def test_gaussian_split_logdet_is_the_log_density(backend):
    state, h = arguments("gaussian_split", channels=6)
    _, logdet = ops.gaussian_split(state, h, backend=backend)
    prior = torch.distributions.Normal(h[:, 0::2], h[:, 1::2].exp())
    assert torch.allclose(logdet, prior.log_prob(state[:, 3:]).sum(dim=(1, 2, 3)), rtol=1e-12)


@operators
@cells
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradcheck(name, backend, inverse):
    tensors = [tensor.requires_grad_() for tensor in arguments(name, channels=4)]
    assert torch.autograd.gradcheck(lambda *t: getattr(ops, name)(*t, inverse=inverse, backend=backend), tensors)


@operators
@cells
@pytest.mark.parametrize("size, batch", [((1, 1), 1), ((5, 3), 1), ((2, 2), 0)], ids=["1x1", "odd", "empty"])
def test_edge_sizes_and_strides(name, backend, size, batch):
    state, *rest = arguments(name, channels=6, size=size, batch=batch)
    expected, expected_logdet = getattr(ops, name)(state, *rest, backend=backend)
    assert expected.shape == state.shape and expected_logdet.shape == (batch,)
    wide = torch.cat([state, state], dim=1)
    for same in (state.to(memory_format=torch.channels_last), wide[:, 6:]):
        y, logdet = getattr(ops, name)(same, *rest, backend=backend)
        assert torch.allclose(y, expected, rtol=1e-12) and torch.allclose(logdet, expected_logdet, rtol=1e-12)


@cells
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_saturated_scales(backend, inverse):
    """raw of ±30: the scale is eps or 1 + eps, its log exact, and nothing overflows."""
    z, h = torch.ones(1, 2, 1, 1), torch.tensor([0.0, -30.0, 0.0, 30.0]).view(1, 4, 1, 1)
    y, logdet = ops.affine_injector(z, h, inverse=inverse, backend=backend)
    sign = -1 if inverse else 1
    assert logdet.item() == pytest.approx(sign * math.log(EPS), rel=1e-4)
    assert y.flatten().tolist() == pytest.approx([EPS**sign, 1.0], rel=2e-4)


BAD_CALLS = {
    "rank": ((0, lambda t: t[0]), ValueError, "must have shape"),
    "integer": ((0, lambda t: t.long()), TypeError, "must be a floating-point tensor"),
    "other-shape": ((1, lambda t: t[..., :-1]), ValueError, "must have shape"),
    "device": ((1, lambda t: t.to("meta")), ValueError, "is on meta"),
    "no-tensor": ((1, lambda t: t.tolist()), (TypeError, ValueError), "must"),
}


@operators
@cells
@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls_name_the_argument(name, backend, bad):
    (position, spoil), error, message = BAD_CALLS[bad]
    tensors = list(arguments(name))
    tensors[position] = spoil(tensors[position])
    argument = (("x", "bias") if name == "actnorm_invconv" else ("z", "h"))[position]
    with pytest.raises(error, match=f"{name}: {argument} .*{message}"):
        getattr(ops, name)(*tensors, backend=backend)


@cells
@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["singular", "nan"])
def test_weight_without_an_inverse(backend, value):
    x, bias, logs, weight = arguments("actnorm_invconv")
    weight[:, 2] = value
    with pytest.raises(ValueError, match="weight is singular or not finite"):
        ops.actnorm_invconv(x, bias, logs, weight, inverse=True, backend=backend)


@operators
def test_a_named_backend_runs_or_says_what_is_missing(name):
    tensors = arguments(name)
    for backend, state in ops.backends().items():
        if state.available:
            getattr(ops, name)(*tensors, backend=backend)
        else:
            with pytest.raises(ops.BackendUnavailable, match=f"{name}: backend '{backend}' is not available: "):
                getattr(ops, name)(*tensors, backend=backend)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference'"):
        getattr(ops, name)(*tensors, backend="fast")
