"""A bad call raises an error that names the argument, what it was and what it should be."""

from __future__ import annotations

import inspect

import pytest
import torch
from operator_cases import arguments, cells, exact_dtype, operators, run

from ncsr_fast import ops

BAD = {
    "rank": (lambda t: t[0], ValueError, "must have shape"),
    "integer": (lambda t: t.long(), TypeError, "must be a floating-point tensor, not torch.int64"),
    "other-shape": (lambda t: t[..., :-1], ValueError, "must have shape"),
    "device": (lambda t: t.to("meta"), ValueError, "is on meta"),
    "no-tensor": (lambda t: t.tolist(), (TypeError, ValueError), "must"),
}


def names_of(name: str) -> list[str]:
    return [key for key in inspect.signature(getattr(ops, name)).parameters if key not in ("eps", "inverse", "backend")]


@operators
@cells
@pytest.mark.parametrize("bad", BAD)
def test_every_argument(name, device, backend, bad):
    """Each tensor but the state, which the others are held to."""
    spoil, error, message = BAD[bad]
    for position, argument in enumerate(names_of(name)[1:], start=1):
        tensors = arguments(name, dtype=torch.float32, device=device)
        tensors[position] = spoil(tensors[position])
        with pytest.raises(error, match=f"{name}: {argument} .*{message}"):
            run(name, *tensors, backend=backend)


@operators
@cells
@pytest.mark.parametrize("bad", ["rank", "integer", "no-tensor"])
def test_the_state(name, device, backend, bad):
    spoil, error, message = BAD[bad]
    state, *rest = arguments(name, dtype=torch.float32, device=device)
    with pytest.raises(error, match=f"{name}: {names_of(name)[0]} .*{message}"):
        run(name, spoil(state), *rest, backend=backend)


@cells
@pytest.mark.parametrize("name", ["affine_injector", "affine_coupling", "flow_step"])
@pytest.mark.parametrize("eps", [0.0, -1e-4, float("nan"), float("inf")])
def test_eps(name, device, backend, eps):
    with pytest.raises(ValueError, match=f"{name}: eps must be positive and finite, not {eps}"):
        getattr(ops, name)(*arguments(name, dtype=torch.float32, device=device), eps, backend=backend)


@cells
@pytest.mark.parametrize("name", ["actnorm_invconv", "flow_step"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=["singular", "nan", "inf"])
def test_weight_without_an_inverse(name, device, backend, value):
    tensors = arguments(name, dtype=exact_dtype(backend), device=device)
    (weight,) = (tensor for tensor in tensors if tensor.dim() == 2)
    weight[:, 2] = value
    if device == "cuda":  # where reading a value would make the host wait
        assert run(name, *tensors, inverse=True, backend=backend)[0].isnan().all()
        return
    with pytest.raises(ValueError, match=f"{name}: weight is singular or not finite"):
        run(name, *tensors, inverse=True, backend=backend)


@operators
def test_a_named_backend_runs_or_says_what_is_missing(name):
    for device in ("cpu", "meta"):
        tensors = arguments(name, dtype=torch.float32, device=device)
        for backend, state in ops.backends(device).items():
            if state.available:
                run(name, *tensors, backend=backend)
            else:
                with pytest.raises(ops.BackendUnavailable, match=f"{name}: backend '{backend}' is not available: "):
                    run(name, *tensors, backend=backend)
    with pytest.raises(ValueError, match=f"{name}: backend must be one of 'auto', 'reference'"):
        run(name, *arguments(name), backend="fast")


def test_auto_is_the_fastest_there_is():
    states = ops.backends("cpu")
    assert ops.resolve_backend("affine_injector", like=torch.empty(1)) == (
        "native" if states["native"].available else "reference"
    )
    assert ops.resolve_backend("affine_injector", like=torch.empty(1, device="meta")) == "reference"
