"""A bad call raises an error that names the argument, what it was and what it should be."""

from __future__ import annotations

import inspect

import network_cases
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


@network_cases.cells
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [name for name, call in network_cases.CALLS.items() if not call.options])
def test_every_argument_of_a_network_or_a_folding(name, device, backend, bad):
    """Each tensor that is given, the first one too: of another device than it the next ones are."""
    spoil, error, message = BAD[bad]
    operator, names = network_cases.CALLS[name].operator, network_cases.CALLS[name].tensors
    tensors = network_cases.arguments(name, dtype=torch.float32, device=device)
    leading = {"conv3x3": "x", "step_network": "pre", "fold": "weight"}[operator]  # which the others are held to
    for position, argument in enumerate(names):
        if tensors[position] is None or (bad == "device" and argument == leading):
            continue
        if bad == "other-shape" and argument in ("x", "pre"):  # an image of another size
            continue
        spoilt = [spoil(tensor) if index == position else tensor for index, tensor in enumerate(tensors)]
        with pytest.raises(error, match=f"{operator}: {argument} .*{message}"):
            network_cases.run(name, *spoilt, backend=backend)


@network_cases.cells_of("step_network")
def test_sizes_of_a_network_that_do_not_fit(device, backend):
    z1, pre, w1, w2, b2, w3, b3 = network_cases.arguments("step_network", dtype=torch.float32, device=device)
    for tensors, message in (
        ((z1, pre, None, w2, b2, w3, b3), "z1 and w1 must both be given, or both be None"),
        ((None, pre, w1, w2, b2, w3, b3), "z1 and w1 must both be given, or both be None"),
        ((z1[:1], pre, w1, w2, b2, w3, b3), "z1 must have shape"),
        ((z1, pre, w1[:, :1], w2, b2, w3, b3), "w1 must have shape"),
        ((z1, pre, w1, w2, b2, w3, b3[:1]), "b3 must have shape"),
        ((z1[:, :, :0], pre[:, :, :0], w1, w2, b2, w3, b3), "pre must have H ≥ 1 and W ≥ 1, not shape"),
    ):
        with pytest.raises(ValueError, match=f"step_network: {message}"):
            ops.step_network(*tensors, backend=backend)


@network_cases.cells_of("conv3x3")
def test_sizes_of_a_convolution_that_do_not_fit(device, backend):
    x, weight, bias = network_cases.arguments("conv3x3", dtype=torch.float32, device=device)
    for tensors, message in (
        ((x[:, 1:], weight, bias), "weight must have shape"),
        ((x, weight, bias[1:]), "bias must have shape"),
        ((x, weight[:, :, :1, :1], bias), "weight must have shape"),
        ((x[..., :0], weight, bias), "x must have H ≥ 1 and W ≥ 1, not shape"),
    ):
        with pytest.raises(ValueError, match=f"conv3x3: {message}"):
            ops.conv3x3(*tensors, backend=backend)


@network_cases.cells_of("fold")
def test_sizes_of_a_folding_that_do_not_fit(device, backend):
    bias, logs, weight = network_cases.arguments("fold", dtype=torch.float32, device=device)
    for tensors, message in (
        ((bias[:, 1:], logs, weight), "bias must have shape"),
        ((bias, logs[1:], weight), "logs must have shape"),
        ((bias, logs, weight[:, 1:]), "weight must have shape"),
        ((bias[:, :0], logs[:, :0], weight[:, :0, :0]), "weight must have shape \\(N, C, C\\) with C ≥ 1"),
    ):
        with pytest.raises(ValueError, match=f"fold: {message}"):
            ops.fold(*tensors, backend=backend)


@pytest.mark.parametrize("name", [name for name, call in network_cases.CALLS.items() if not call.options])
def test_a_backend_without_the_operator_says_so(name):
    operator = network_cases.CALLS[name].operator
    for device in ("cpu", "meta"):
        tensors = network_cases.arguments(name, dtype=torch.float32, device=device)
        for backend in ("reference", "native", "triton"):
            try:
                resolved = ops.resolve_backend(operator, backend, tensors[1])
            except ops.BackendUnavailable as error:
                with pytest.raises(
                    ops.BackendUnavailable, match=f"{operator}: backend '{backend}' is not available: "
                ) as raised:
                    network_cases.run(name, *tensors, backend=backend)
                assert str(raised.value) == str(error)
            else:
                assert resolved == backend
                network_cases.run(name, *tensors, backend=backend)
    with pytest.raises(ValueError, match=f"{operator}: backend must be one of 'auto', 'reference'"):
        network_cases.run(name, *network_cases.arguments(name), backend="fast")
