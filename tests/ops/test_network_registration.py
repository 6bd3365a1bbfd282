"""`conv3x3`, `step_network` and `fold` as torch.library sees them: schema, fake, autograd, torch.compile; and transforms."""

from __future__ import annotations

import installation
import pytest
import torch
from layouts import laid_out
from network_cases import (
    CALLS,
    Tensors,
    arguments,
    calls,
    cells,
    cells_of,
    differentiable,
    formula,
    given,
    gradients,
    run,
    tolerance,
    weights_of,
)
from operator_cases import assert_close, exact_dtype, interpreted, marked, where
from support import Watch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from ncsr_fast import ops

layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
registered = where(lambda backend: backend != "reference")  # which is plain PyTorch
native = pytest.mark.skipif(not installation.expects("native"), reason="the native backend is not among the cells")
SINGLE = torch.float32


def settings(name: str, backend: str) -> tuple:
    """Those that follow the tensors in a call of the registered operator."""
    call = CALLS[name]
    if call.operator == "conv3x3":
        return call.options.get("upsample2x", False), False, backend
    if call.operator == "fold":
        return call.options.get("inverse", False), "matrix {}", backend
    return False, backend


def registered_operators(name: str) -> tuple:
    """Forward and backward."""
    operator = CALLS[name].operator
    return getattr(torch.ops.ncsr_fast, operator).default, getattr(torch.ops.ncsr_fast, f"{operator}_backward").default


def lying(name: str, layout: str, device: str, channels: int = 6) -> Tensors:
    return [laid_out(x, layout) for x in differentiable(arguments(name, channels, 5, dtype=SINGLE, device=device))]


@calls
@cells
@registered
@layouts
@pytest.mark.parametrize("channels", [1, 6])
@marked("exhaustive", lambda backend, layout, channels: interpreted(backend) and (layout, channels) != ("channels_last", 6))
@marked("slow", interpreted)
def test_opcheck(name, device, backend, layout, channels):
    """Nothing is written into arguments, and fake tensors have the shapes, dtypes and strides of the real ones."""
    arguments_of_call = (*lying(name, layout, device, channels), *settings(name, backend))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(registered_operators(name)[0], arguments_of_call, test_utils=utilities)


@calls
@cells
@registered
@pytest.mark.slow
@marked("exhaustive", interpreted)
def test_opcheck_traced(name, device, backend):
    arguments_of_call = (*lying(name, "contiguous", device), *settings(name, backend))
    torch.library.opcheck(registered_operators(name)[0], arguments_of_call, test_utils="test_aot_dispatch_dynamic")


@calls
@cells
@registered
@layouts
@pytest.mark.parametrize("channels", [1, 6])
@marked("exhaustive", interpreted)  # up to eight calls
def test_opcheck_of_the_backward(name, device, backend, layout, channels):
    """All gradients, and each of them alone."""
    tensors = [None if x is None else x.detach() for x in lying(name, layout, device, channels)]
    forward, backward = registered_operators(name)
    outputs = forward(*tensors, *settings(name, backend))
    grads = [torch.ones_like(x) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]
    places = [index for index, tensor in enumerate(tensors) if tensor is not None]
    for wanted in (places, *[[place] for place in places]):
        needed = [index in wanted for index in range(len(tensors))]
        utilities = ("test_schema", "test_faketensor")  # it has no autograd formula
        torch.library.opcheck(backward, (*grads, *tensors, needed, *settings(name, backend)), test_utils=utilities)


@cells_of("step_network")
@registered
@marked("exhaustive", interpreted)  # what is registered is that of all backends
def test_opcheck_of_a_state_of_another_dtype(device, backend):
    """Its gradient comes in its dtype."""
    state, *rest = [x.detach() for x in lying("step_network", "contiguous", device)]
    forward, backward = registered_operators("step_network")
    tensors = [state.double(), *rest]
    grad = torch.ones_like(forward(*tensors, *settings("step_network", backend)))
    call = (grad, *tensors, [True] * len(tensors), *settings("step_network", backend))
    torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))


class Graphs:
    """A compiler that runs graphs as they are, and knows which operators were in them."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.backend = aot_autograd(fw_compiler=self._record, bw_compiler=self._record)

    def _record(self, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        self.called += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph


@calls
@cells
@layouts
@marked(
    "slow",
    lambda name, backend, layout: (backend, layout) != ("native", "channels_last") or name not in ("step_network", "fold"),
)
@marked("exhaustive", lambda backend, layout: backend != "native" and layout != "channels_last")
def test_compile_fullgraph(name, device, backend, layout):
    """One graph, forward and backward, equal to the eager call, and in it the operator, not what the operator is made of."""
    tensors = lying(name, layout, device, 12)

    def function(*t: Tensor | None) -> Tensor:
        return sum((2 * output).sin().sum() for output in run(name, *t, backend=backend))

    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend, dynamic=False)
    loss, expected = compiled(*tensors), function(*tensors)
    assert_close(loss, expected, 20 * tolerance(name, SINGLE), "loss")
    found, right = (torch.autograd.grad(value, given(tensors)) for value in (loss, expected))
    for value, other in zip(found, right, strict=True):
        assert_close(value, other, 20 * max(tolerance(name, SINGLE), 1e-6), "gradient")
    operator = CALLS[name].operator
    names = [f"ncsr_fast.{operator}.default", f"ncsr_fast.{operator}_backward.default"]
    assert [each for each in graphs.called if each in names] == (names if backend != "reference" else [])
    assert not [each for each in graphs.called if "convolution" in each and backend != "reference"]


@native
def test_auto_takes_the_kernel_in_a_compiled_graph():
    """Of a channels-last convolution, a network and a stack of maps."""
    for name in ("conv3x3", "step_network", "fold"):
        tensors = [laid_out(x, "channels_last") for x in arguments(name, 12, 12, dtype=SINGLE)]
        graphs = Graphs()
        torch._dynamo.reset()
        compiled = torch.compile(lambda *t: run(name, *t), fullgraph=True, backend=graphs.backend, dynamic=False)
        for value, expected in zip(compiled(*tensors), run(name, *tensors), strict=True):
            assert torch.equal(value, expected)
        assert f"ncsr_fast.{name}.default" in graphs.called


@native
def test_a_singular_matrix_is_named_from_a_compiled_graph():
    bias, logs, weight = arguments("fold", 4, dtype=SINGLE)
    weight[1] = 0
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ops.fold(*t, inverse=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="fold: matrix 1: weight is singular"):
        compiled(bias, logs, weight)


@pytest.mark.slow
@calls
@cells
@registered
@marked("exhaustive", interpreted)
def test_compile_with_inductor_and_sizes_that_change(name, device, backend):
    """The compiler that users get, for sizes it has not seen."""

    def function(*t: Tensor | None) -> list[Tensor]:
        return [2 * output for output in run(name, *t, backend=backend)]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for size, batch in (((3, 4), 2), ((5, 7), 3)):
        tensors = arguments(name, 12, 8, size, batch, dtype=SINGLE, device=device)
        for value, expected in zip(compiled(*tensors), function(*tensors), strict=True):
            assert_close(value, expected, tolerance(name, SINGLE), "compiled")


@native
@calls
def test_eager_calls_do_not_pass_the_dispatcher(name):
    """Its overhead is that of a small kernel: the registered operators are for compiled calls."""
    tensors = differentiable(arguments(name, dtype=SINGLE))
    seen: list[str] = []
    with Watch(lambda called, _: seen.append(called)):
        outputs = run(name, *tensors, backend="native")
        gradients(outputs, weights_of(outputs), tensors)
    assert seen and not [called for called in seen if called.startswith("ncsr_fast")]


@calls
@cells
def test_transforms_take_the_reference(name, device, backend, monkeypatch):
    """vmap, a gradient by torch.func, a Jacobian by batched gradients and forward differentiation: by no kernel, the same."""
    dtype = exact_dtype(backend)
    tensors, allowed = arguments(name, 2, 3, (2, 2), batch=1, dtype=dtype, device=device), 10 * tolerance(name, dtype)
    place = next(index for index, tensor in enumerate(tensors) if tensor is not None)
    if backend == "native":
        from ncsr_fast.ops import passing

        monkeypatch.setattr(passing, "_launch", forbidden)

    def of_first(x: Tensor) -> tuple[Tensor, ...]:
        return run(name, *tensors[:place], x, *tensors[place + 1 :], backend=backend)

    def by_formula(x: Tensor) -> tuple[Tensor, ...]:
        return formula(name, *tensors[:place], x, *tensors[place + 1 :])

    def loss(function, x: Tensor) -> Tensor:
        return sum(output.sin().sum() for output in function(x))

    first = tensors[place]
    several = torch.stack([first, 2 * first])
    mapped = torch.func.vmap(of_first)(several)
    for index in (0, 1):
        for value, expected in zip(mapped, by_formula(several[index]), strict=True):
            assert_close(value[index], expected, allowed, "vmap")
    expected = torch.autograd.grad(loss(by_formula, first.requires_grad_()), first)[0]
    assert_close(torch.func.grad(lambda x: loss(of_first, x))(first.detach()), expected, allowed, "torch.func.grad")
    direction = torch.ones_like(first)
    _, (found, *_) = torch.func.jvp(of_first, (first.detach(),), (direction,))
    _, (right, *_) = torch.func.jvp(by_formula, (first.detach(),), (direction,))
    assert_close(found, right, allowed, "torch.func.jvp")


def forbidden(*_: object) -> None:
    raise AssertionError("a kernel was called")


@calls
@cells
@marked("slow", interpreted)
@marked("exhaustive", lambda name, backend: interpreted(backend) and name != "conv3x3")  # no kernel is called
def test_batched_gradients(name, device, backend):
    """A Jacobian whose rows are computed at once is that of one row after the other."""
    dtype = exact_dtype(backend)
    tensors = arguments(name, 2, 3, (2, 2), batch=1, dtype=dtype, device=device)
    place = next(index for index, tensor in enumerate(tensors) if tensor is not None)

    def of_first(x: Tensor) -> Tensor:
        return run(name, *tensors[:place], x, *tensors[place + 1 :], backend=backend)[0]

    jacobians = [torch.autograd.functional.jacobian(of_first, tensors[place], vectorize=each) for each in (False, True)]
    assert_close(*jacobians, 10 * tolerance(name, dtype), "jacobian")
