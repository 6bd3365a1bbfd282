"""The operators as torch.library sees them: schema, fake, autograd, torch.compile."""

from __future__ import annotations

import installation
import pytest
import torch
from layouts import laid_out
from operator_cases import (
    EPS,
    ROUNDING,
    arguments,
    assert_close,
    cells,
    differentiable,
    directions,
    interpreted,
    marked,
    operators,
    run,
    where,
)
from support import Watch
from torch import Tensor

from ncsr_fast import ops

layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
REGISTERED = {"affine_injector": "affine", "affine_coupling": "affine", "gaussian_split": "gaussian_split"}


def registered_call(name: str, inverse: bool, backend: str, tensors: list) -> tuple:
    """The registered operator behind a public one, and the arguments of a call."""
    op = getattr(torch.ops.ncsr_fast, REGISTERED.get(name, "flow_step"))
    if name == "gaussian_split":
        return op, (*tensors, inverse, backend)
    if name in REGISTERED:
        return op, (*tensors, tensors[0].shape[1] // 2 if name == "affine_coupling" else 0, EPS, inverse, backend)
    if name == "actnorm_invconv":
        x, bias, logs, weight = tensors
        return op, (x, None, bias, logs, weight, None, EPS, inverse, name, backend)
    return op, (*tensors, EPS, inverse, name, backend)


def lying(tensors: list[Tensor], layout: str) -> list[Tensor]:
    return [laid_out(tensor, layout) for tensor in tensors]


registered = where(lambda backend: backend != "reference")  # which is plain PyTorch


@where
def in_turn(backend: str, inverse: bool, layout: str) -> bool:
    """Both directions of one backend, each in two layouts, and one call of the others, which pass through the same operator."""
    if backend == "native":
        return layout == "contiguous" or inverse == (layout == "sliced")
    return (inverse, layout) == (False, "contiguous")


@operators
@cells
@registered
@directions
@layouts
@marked("slow", lambda backend, inverse, layout: interpreted(backend) or (inverse and layout != "contiguous"))
def test_opcheck(name, device, backend, inverse, layout):
    """Nothing is written into arguments, and fake tensors have the shapes, dtypes and strides of the real ones."""
    tensors = lying(differentiable(arguments(name, channels=6, size=(2, 3), dtype=torch.float32, device=device)), layout)
    op, call = registered_call(name, inverse, backend, tensors)
    torch.library.opcheck(op.default, call, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@operators
@cells
@registered
@directions
@where(lambda backend: not interpreted(backend))  # what is traced is the same operator
@pytest.mark.slow
@marked("exhaustive", lambda inverse: inverse)  # test_compile_fullgraph has both
def test_opcheck_traced(name, device, backend, inverse):
    tensors = differentiable(arguments(name, channels=6, size=(2, 3), dtype=torch.float32, device=device))
    op, call = registered_call(name, inverse, backend, tensors)
    torch.library.opcheck(op.default, call, test_utils="test_aot_dispatch_dynamic")


@operators
@cells
@registered
@layouts
@marked("slow", interpreted)
def test_opcheck_of_the_backward(name, device, backend, layout):
    tensors = lying(arguments(name, channels=6, size=(2, 3), dtype=torch.float32, device=device), layout)
    op, call = registered_call(name, False, backend, tensors)
    y, logdet = op(*call)
    backward = getattr(torch.ops.ncsr_fast, f"{op.__name__}_backward").default
    saved = [y] if op is torch.ops.ncsr_fast.flow_step else []
    count = op.default._schema.arguments.index(next(x for x in op.default._schema.arguments if "Tensor" not in str(x.type)))
    given, settings = call[:count], call[count:]
    utilities = ("test_schema", "test_faketensor")  # it has no autograd formula, and the gradient of a gradient none of it
    for needed in ([tensor is not None for tensor in given], [True] + [False] * (count - 1)):
        torch.library.opcheck(backward, (torch.ones_like(y), logdet, *saved, *given, needed, *settings), test_utils=utilities)


@operators
@cells
@directions
@layouts
@in_turn
@marked("slow", lambda backend, inverse, layout: backend != "native" or inverse or layout != "contiguous")
def test_compile_fullgraph(name, device, backend, inverse, layout):
    """One graph, forward and backward, equal to the eager call."""
    tensors = lying(differentiable(arguments(name, channels=6, dtype=torch.float32, device=device)), layout)

    def function(*t):
        y, logdet = run(name, *t, inverse=inverse, backend=backend)
        return (2 * y).sin().sum() + logdet.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    loss, expected = compiled(*tensors), function(*tensors)
    assert_close(loss, expected, ROUNDING[torch.float32], "loss")
    for grad, reference in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors)):
        assert_close(grad, reference, 20 * ROUNDING[torch.float32], "gradient")


@pytest.mark.slow
@cells
@registered
@marked("exhaustive", interpreted)
def test_compile_with_inductor_and_sizes_that_change(device, backend):
    """The compiler that users get, for sizes it has not seen."""

    def function(z, h):
        y, logdet = ops.affine_coupling(z + 1, h, backend=backend)
        return y * 2, logdet

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for size in ((2, 3), (4, 5)):
        tensors = arguments("affine_coupling", size=size, dtype=torch.float32, device=device)
        for value, expected in zip(compiled(*tensors), function(*tensors)):
            assert_close(value, expected, ROUNDING[torch.float32], "compiled")


@pytest.mark.skipif(not installation.expects("native"), reason="the native backend is not among the cells")
@operators
def test_eager_calls_do_not_pass_the_dispatcher(name, monkeypatch):
    """Its overhead is that of a small kernel: the registered operators are for compiled calls."""
    tensors = differentiable(arguments(name, dtype=torch.float32))
    seen = []
    with Watch(lambda name, _: seen.append(name)):
        y, logdet = run(name, *tensors, backend="native")
        torch.autograd.grad(y.sum() + logdet.sum(), tensors)
    assert seen and not [call for call in seen if call.startswith("ncsr_fast")]
