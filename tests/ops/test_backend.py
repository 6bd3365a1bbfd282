"""The backends have the functions they claim, for the devices and dtypes they claim, and refuse what they do not."""

from __future__ import annotations

import inspect

import installation
import network_cases
import operator_cases
import pytest
import torch
from operator_cases import cells, interpreted, marked

from ncsr_fast import ops
from ncsr_fast.ops.backend import BACKENDS, COVERAGE, _best, _not_covered, covering_backend, kernels
from ncsr_fast.ops.fallback import _kernel
from ncsr_fast.ops.protocol import Kernels

FUNCTIONS = {
    "affine": ("affine_forward", "affine_backward"),
    "gaussian_split": ("gaussian_split_forward", "gaussian_split_backward"),
    "flow_step": ("flow_step_forward", "flow_step_backward"),
    "flow_step_mix": ("flow_step_mix_backward",),
    "inverse_logdet": ("inverse_logdet",),
    "fold": ("fold_forward", "fold_backward"),
    "fold_filters": ("fold_filters_forward", "fold_filters_backward"),
    "conv3x3": ("conv3x3_forward", "conv3x3_backward"),
    "conv3x3_weights": ("conv3x3_weights",),
    "dense_blocks": ("dense_blocks_forward", "dense_blocks_backward"),
    "hoisted": ("hoisted_forward", "hoisted_backward"),
    "step_network": (
        "step_network_forward", "step_network_layers", "step_network_tails", "step_network_backward",
        "step_network_weights_backward", "step_network_coupled",
    ),
    "step_network_weights": ("step_network_weights",),
}  # fmt: skip
KERNEL_OF = {"affine_injector": "affine", "affine_coupling": "affine", "actnorm_invconv": "flow_step"}
OPERATORS = (*ops.OPERATORS, "inverse_logdet", "fold", "conv3x3", "step_network")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def call(operator: str, device: str, dtype: torch.dtype, backend: str) -> object:
    """An operator on small tensors."""
    if operator in ops.OPERATORS:
        return operator_cases.run(operator, *operator_cases.arguments(operator, 4, dtype=dtype, device=device), backend=backend)
    if operator == "inverse_logdet":
        return ops.inverse_logdet(torch.eye(4, dtype=dtype, device=device)[None], backend=backend)
    return network_cases.run(operator, *network_cases.arguments(operator, 4, dtype=dtype, device=device), backend=backend)


def claimed(backend: str, operator: str, device: str, dtype: torch.dtype) -> bool:
    if backend == "reference":
        return True
    coverage = COVERAGE[backend].get(KERNEL_OF.get(operator, operator))
    return coverage is not None and device in coverage.devices and dtype in coverage.dtypes


def test_the_table_is_of_the_contract():
    """Every function of the contract belongs to one kernel, and a kernel of the table is one of those."""
    functions = [function for names in FUNCTIONS.values() for function in names]
    assert sorted(functions) == sorted(name for name in vars(Kernels) if not name.startswith("_"))
    assert set(COVERAGE) == set(BACKENDS) - {"reference"}
    assert all(set(table) <= set(FUNCTIONS) for table in COVERAGE.values())


def test_a_function_that_fails_is_known_by_its_kernel():
    assert {name: _kernel(name) for names in FUNCTIONS.values() for name in names} == {
        name: kernel for kernel, names in FUNCTIONS.items() for name in names
    }


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if installation.expects(backend)])
@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_a_backend_has_the_functions_it_claims_and_no_others(backend, kernel):
    """With the arguments of the contract, by the same names: a caller may name them."""
    for name in FUNCTIONS[kernel]:
        function = getattr(kernels(backend), name, None)
        if backend != "reference" and kernel not in COVERAGE[backend]:
            assert function is None
            continue
        expected = [*inspect.signature(getattr(Kernels, name)).parameters.values()][1:]  # without self
        found = inspect.signature(function).parameters.values()
        assert [(x.name, x.kind, x.default) for x in found] == [(x.name, x.kind, x.default) for x in expected]


@cells
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@marked("slow", interpreted)
def test_a_named_backend_runs_what_it_claims_and_refuses_the_rest(device, backend, operator, dtype):
    if claimed(backend, operator, device, dtype):
        call(operator, device, dtype, backend)
        return
    kernel = KERNEL_OF.get(operator, operator)
    lacks = f"it has no {kernel}" if kernel not in COVERAGE[backend] else f"its {kernel} does not compute in {str(dtype)[6:]}"
    with pytest.raises(
        ops.BackendUnavailable, match=f"{operator}: backend '{backend}' is not available: {lacks}; use backend="
    ):
        call(operator, device, dtype, backend)


@cells
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_and_a_backend_that_need_not_cover_all_fall_back(device, backend, operator, dtype):
    like, kernel = torch.empty(1, dtype=dtype, device=device), KERNEL_OF.get(operator, operator)
    assert covering_backend(kernel, backend, like) == (backend if claimed(backend, operator, device, dtype) else "reference")
    assert covering_backend(kernel, "auto", like) == ops.resolve_backend(operator, "auto", like)
    call(operator, device, dtype, "auto")


def test_auto_is_a_backend_that_claims_the_operator():
    states = ops.backends("cpu")
    for operator in OPERATORS:
        for dtype in DTYPES:
            best = ops.resolve_backend(operator, "auto", torch.empty(1, dtype=dtype))
            can = states["native"].available and claimed("native", operator, "cpu", dtype)
            assert best == ("native" if can else "reference"), (operator, dtype)
        assert ops.resolve_backend(operator, "auto", torch.empty(1, device="meta")) == "reference"


@pytest.mark.skipif(not installation.expects("triton"), reason="the Triton backend is not among the cells")
def test_auto_leaves_out_what_was_measured_on_no_gpu():
    """On CUDA tensors, with a GPU or without one; of a backend that would be the first choice."""
    assert _best("affine", "cuda", "torch.float32") == "triton"
    for kernel in ("conv3x3", "step_network", "fold_filters"):
        assert [_best(kernel, "cuda", str(dtype)) for dtype in COVERAGE["triton"][kernel].dtypes] == ["reference"] * 3


def test_the_advice_names_a_backend_that_has_the_operator():
    """Whichever device; of a kernel that others have in that dtype, all of them."""
    assert _not_covered("native", "fold", "cuda", "torch.float32") == (
        "its fold runs on cpu tensors, not on cuda tensors; use backend='reference'"
    )
    assert _not_covered("triton", "fold", "cuda", "torch.float32") == "it has no fold; use backend='reference'"
    assert _not_covered("triton", "affine", "cuda", "torch.float64") == (
        "its affine does not compute in float64; use backend='reference' or 'native'"
    )
    assert _not_covered("native", "conv3x3", "cpu", "torch.bfloat16") == (
        "its conv3x3 does not compute in bfloat16; use backend='reference' or 'triton'"
    )
