"""What the tests of the operators share: arguments, the maps written from their definitions, and the cells to test."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterable

import installation
import pytest
import torch
from torch import Tensor

from ncsr_fast import ops

if installation.expects("native"):
    from ncsr_fast import _native

EPS = 1e-4
WIDEST = _native.instruction_sets()[0] if installation.expects("native") else None
CELLS = [pytest.param(*cell, id="-".join(cell)) for cell in installation.cells()]
cells = pytest.mark.parametrize("device, backend", CELLS)
operators = pytest.mark.parametrize("name", ops.OPERATORS)
directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
# what rounding may do to a result of the sizes here, beside its largest element, from a float64 oracle of the same input:
# some 50 ulp of float32, where sums of up to 192 products are, and 4 of the half-precision formats, which round once
ROUNDING = {torch.float64: 1e-13, torch.float32: 6e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def where(predicate: Callable[..., bool]) -> pytest.MarkDecorator:
    """Decorator that keeps those cells of a test for which a predicate of some of its parameters, by name, holds."""
    return pytest.mark.cells_where.with_args(predicate, tuple(inspect.signature(predicate).parameters))


def marked(mark: str, predicate: Callable[..., bool]) -> pytest.MarkDecorator:
    """Decorator that marks as "slow" or "exhaustive" those cells of a test for which a predicate of some parameters holds."""
    return pytest.mark.cells_marked.with_args(mark, predicate, tuple(inspect.signature(predicate).parameters))


def pairwise_but_on_the_widest(**choices: Iterable) -> pytest.MarkDecorator:
    """Decorator of a test of all combinations of these parameters on each instruction set: all on the widest one, on the
    others a few in which each pair of values of any two parameters is there.
    """
    few = pairwise(*choices.values())

    def wanted(instruction_set: str, *values) -> bool:
        return instruction_set == WIDEST or values in few

    return pytest.mark.cells_where.with_args(wanted, ("instruction_set", *choices))


def pairwise(*choices: Iterable) -> set[tuple]:
    """Combinations of one of each, chosen greedily until each pair is in one of them."""
    every = [(each, set(itertools.combinations(enumerate(each), 2))) for each in itertools.product(*choices)]
    missing, chosen = set().union(*(pairs for _, pairs in every)), set()
    while missing:
        best, pairs = max(every, key=lambda entry: len(entry[1] & missing))
        chosen.add(best)
        missing -= pairs
    return chosen


def exact_dtype(backend: str) -> torch.dtype:
    """float64, which all backends but Triton's kernels have."""
    return torch.float32 if backend == "triton" else torch.float64


def arguments(name: str, channels: int = 6, size=(2, 3), batch: int = 2, dtype=torch.float64, device="cpu") -> list[Tensor]:
    """The state and the other tensors of a call, in their order."""
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    half = channels - channels // 2
    state = normal(batch, channels, *size)
    mixing = torch.linalg.qr(normal(channels, channels))[0] + 0.1 / channels * normal(channels, channels)
    parameters = [normal(channels), 0.3 * normal(channels), mixing]
    rest = {
        "actnorm_invconv": lambda: parameters,
        "affine_injector": lambda: [normal(batch, 2 * channels, *size)],
        "affine_coupling": lambda: [normal(batch, 2 * half, *size)],
        "gaussian_split": lambda: [0.5 * normal(batch, 2 * max(1, channels // 2), *size)],
        "flow_step": lambda: [normal(batch, 2 * half, *size), *parameters, normal(batch, 2 * channels, *size)],
    }[name]()
    return [tensor.to(device, dtype) for tensor in (state, *rest)]


def formula(name: str, state: Tensor, *rest: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The map and its log-det, from the definition."""
    if name == "flow_step":
        coupling, bias, logs, weight, injector = rest
        parts = [("affine_coupling", (coupling,)), ("actnorm_invconv", (bias, logs, weight)), ("affine_injector", (injector,))]
        logdets = []
        for part, tensors in reversed(parts) if inverse else parts:
            state, logdet = formula(part, state, *tensors, inverse=inverse)
            logdets.append(logdet)
        return state, sum(logdets)
    if name == "actnorm_invconv":
        bias, logs, weight = rest
        logdet = (logs.sum() + torch.linalg.slogdet(weight)[1]) * state[0, 0].numel()
        if inverse:
            mixed = torch.einsum("oc,bchw->bohw", torch.linalg.inv(weight), state)
            return mixed * torch.exp(-logs)[:, None, None] - bias[:, None, None], -logdet.expand(len(state))
        normalized = (state + bias[:, None, None]) * logs.exp()[:, None, None]
        return torch.einsum("oc,bchw->bohw", weight, normalized), logdet.expand(len(state))
    (h,) = rest
    first, second = h[:, 0::2], h[:, 1::2]
    kept = state.shape[1] - first.shape[1]
    z1, z2 = state[:, :kept], state[:, kept:]
    if name == "gaussian_split":
        changed = first + second.exp() * z2 if inverse else (z2 - first) / second.exp()
        whole = changed if inverse else z2
        logdet = torch.distributions.Normal(first, second.exp(), validate_args=False).log_prob(whole).sum(dim=(1, 2, 3))
    else:
        scale = 1 / (1 + torch.exp(-second - 2)) + EPS
        changed = z2 / scale - first if inverse else (z2 + first) * scale
        logdet = scale.log().sum(dim=(1, 2, 3))
    return torch.cat([z1, changed], dim=1), -logdet if inverse else logdet


def run(name: str, *tensors: Tensor, inverse: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return getattr(ops, name)(*tensors, inverse=inverse, backend=backend)


def differentiable(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def assert_close(value: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Largest difference over the largest magnitude, both finite."""
    assert value.shape == expected.shape, what
    assert value.isfinite().all(), f"{what} is not finite"
    if value.numel():
        error = (value.double().cpu() - expected.double().cpu()).abs().max() / expected.abs().max().cpu().clamp(min=1e-30)
        assert error < tolerance, f"{what}: relative error {error:.1e}, more than {tolerance:.1e}"


def interpreted(backend: str) -> bool:
    """Whether a backend runs in Triton's interpreter, thousands of times slower than on a GPU."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
