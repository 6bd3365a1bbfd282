"""Values do not depend on how a tensor lies in memory: every operator and every call of the compiled module."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS, laid_out
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
)
from torch import Tensor

import ncsr_fast
from ncsr_fast import ops
from ncsr_fast.ops.network_gradients import NetworkPass, StepNetwork
from ncsr_fast.ops.protocol import Kernels

native = pytest.mark.skipif(not ops.backends("cpu")["native"].available, reason="the compiled module is not there")
layouts = pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
SIZES = [(3, 5), (1, 4), (4, 1), (1, 1)]


def in_other_direction(backend: str, layout: str, inverse: bool) -> bool:
    """In the interpreter, every other cell: memory is read by the same lines in both directions."""
    return interpreted(backend) and inverse == bool([*LAYOUTS].index(layout) % 2)


def outcome(name: str, tensors: list[Tensor], weights: list[Tensor], inverse: bool, backend: str) -> list[Tensor]:
    """y, logdet, and all gradients of their sum with these weights."""
    outputs = run(name, *tensors, inverse=inverse, backend=backend)
    return [output.detach() for output in outputs] + list(torch.autograd.grad(outputs, tensors, weights))


@cells
@operators
@directions
@layouts
@marked("slow", lambda backend, layout: interpreted(backend) and layout != "channels of channels_last")
@marked("exhaustive", in_other_direction)
def test_operators(device, backend, name, inverse, layout):
    """Arguments and the gradients of the results, all in one layout; results lie as the state does."""
    dtype = exact_dtype(backend)
    fewest = 2 if name == "gaussian_split" else 1
    last = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    cases = [((2, 3), 3)] if interpreted(backend) else [*itertools.product(SIZES, (6, fewest)), ((5, 7), 12)]
    for size, channels in cases:
        tensors = differentiable(arguments(name, channels, size, dtype=dtype, device=device))
        generator = torch.Generator().manual_seed(0)
        shapes = tensors[0].shape, tensors[0].shape[:1]
        weights = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]
        expected = outcome(name, tensors, weights, inverse, backend)
        lying = [laid_out(tensor, layout) for tensor in (*tensors, *weights)]
        found = outcome(name, lying[:-2], lying[-2:], inverse, backend)
        assert backend == "reference" or found[0].is_contiguous(memory_format=last)
        for what, value, right in zip(("y", "logdet", *["gradient"] * 9), found, expected):
            assert_close(value, right, 20 * ROUNDING[dtype], f"{what} of {size}, {channels} channels")


@cells
@operators
@marked("slow", interpreted)
def test_shared_memory(device, backend, name):
    """Expanded tensors: every sample, and every pixel, is the same memory."""
    dtype = exact_dtype(backend)
    given = arguments(name, 3 if interpreted(backend) else 6, dtype=dtype, device=device)
    tensors = [x[:1, :, :1, :1].expand_as(x) if x.dim() == 4 else x[:1].expand_as(x) for x in given]
    if len(tensors) > 3:  # a matrix of equal rows is singular
        place = -1 if name == "actnorm_invconv" else 4
        tensors[place] = given[place]
    weights = [torch.ones((), dtype=dtype, device=device).expand(shape) for shape in (tensors[0].shape, (2,))]
    found = outcome(name, [x.requires_grad_() for x in tensors], weights, False, backend)
    dense = [x.detach().contiguous().requires_grad_() for x in tensors]
    for value, right in zip(found, outcome(name, dense, [weight.contiguous() for weight in weights], False, backend)):
        assert_close(value, right, 20 * ROUNDING[dtype], name)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def step_arguments() -> list[Tensor]:
    return [normal(2, 6, 3, 5), normal(6, 6), normal(6), normal(2, 6, 3, 5), normal(2, 12, 3, 5)]


def network_arguments() -> list[Tensor]:
    w2 = normal(8, 8, 1, 1)
    return [normal(2, 6, 3, 5), normal(2, 8, 3, 5), normal(8, 6, 3, 3), w2, normal(8), normal(4, 8, 3, 3), normal(4)]


def network_backward(dh: Tensor, z1: Tensor, pre: Tensor, *weights: Tensor) -> list[Tensor]:
    """All that `step_network_backward` returns and writes, of the compiled module."""
    from ncsr_fast.ops import native as c

    dpre, dz1 = torch.empty_like(pre), torch.ones_like(z1)
    (layers,) = c.step_network_backward([dh], [z1], [pre], None, [StepNetwork(*weights)], [dpre], [dz1])
    return [layers.h1, layers.h2, layers.dh2, dpre, dz1]


def network_weights_backward(*tensors: Tensor) -> list[Tensor]:
    from ncsr_fast.ops import native as c

    gradients = StepNetwork(*map(torch.empty_like, network_arguments()[2:]))
    c.step_network_weights_backward([NetworkPass(*tensors)], [gradients])
    return list(gradients)


def fold_arguments() -> list[Tensor]:
    return [normal(6), 0.1 * normal(6), normal(6, 6)]


def stacked(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack([tensor, 2 * tensor, -tensor]) for tensor in tensors]


def of(call, *constants, **named):
    return lambda *tensors: call(*tensors, *constants, **named)


def calls() -> dict:
    """Every function of `ops.native`, as one of tensors, and tensors for it."""
    from ncsr_fast.ops import native as c

    x, h = normal(2, 6, 3, 5), normal(2, 6, 3, 5)
    image, weight, bias = normal(2, 7, 4, 6), normal(9, 7, 3, 3), normal(9)
    dy, small = normal(2, 9, 4, 6), normal(2, 7, 2, 3)
    step_gradient = [normal(2, 6, 3, 5), normal(2), *step_arguments()[:1], normal(2, 6, 3, 5), *step_arguments()[1:2]]
    fold_gradients, all_three = [normal(6, 6), normal(6), normal(1)[0]], (True, True, True)
    return {
        "affine_forward": (of(c.affine_forward, 3, 1e-4, False), [x, h]),
        "affine_backward": (of(c.affine_backward, 3, 1e-4, False), [normal(2, 6, 3, 5), normal(2), x, h]),
        "gaussian_split_forward": (of(c.gaussian_split_forward, False), [x, h]),
        "gaussian_split_backward": (of(c.gaussian_split_backward, False), [normal(2, 6, 3, 5), normal(2), x, h]),
        "flow_step_forward": (of(c.flow_step_forward, 1e-4, False), step_arguments()),
        "flow_step_backward": (of(c.flow_step_backward, 1e-4, False), [*step_gradient, *step_arguments()[3:]]),
        "step_network_forward": (c.step_network_forward, network_arguments()),
        "step_network_layers": (c.step_network_layers, network_arguments()),
        "step_network_tails": (
            c.step_network_tails,
            [normal(2, 16, 3, 5), normal(2, 8, 8, 1, 1), normal(2, 8), normal(2, 4, 8, 3, 3), normal(2, 4)],
        ),
        "step_network_backward": (network_backward, [normal(2, 4, 3, 5), *network_arguments()]),
        "step_network_weights_backward": (
            network_weights_backward, [normal(2, channels, 3, 5) for channels in (6, 8, 8, 8, 8, 8, 4)],
        ),
        "conv3x3_forward": (of(c.conv3x3_forward, slope=0.2), [image, weight, bias]),
        "conv3x3_forward, upsample2x": (lambda *t: c.conv3x3_forward(*t, None, upsample2x=True), [image, weight]),
        "conv3x3_backward": (
            lambda dy, x, weight, relu: c.conv3x3_backward(dy, x, weight, all_three, relu=(relu, 0.2)),
            [dy, image, weight, normal(2, 3, 4, 6)],
        ),
        "conv3x3_backward, upsample2x": (of(c.conv3x3_backward, all_three, upsample2x=True), [dy, small, weight]),
        "inverse_logdet": (c.inverse_logdet, stacked([normal(6, 6)])),
        "fold_forward": (lambda *t: c.fold_forward("fold", *t, False, torch.float64), fold_arguments()),
        "fold_forward, stacked": (lambda *t: c.fold_forward("fold", *t, True, torch.float64), stacked(fold_arguments())),
        "fold_backward": (lambda *t: c.fold_backward(*t[:3], False, *t[3:]), [*fold_arguments(), *fold_gradients]),
        "fold_backward, stacked": (
            lambda *t: c.fold_backward(*t[:3], True, *t[3:]), stacked([*fold_arguments(), *fold_gradients]),
        ),
    }  # fmt: skip


@native
def test_every_function_of_the_compiled_module_is_called():
    """The cases above are those of the contract that it has."""
    from ncsr_fast.ops import native

    of_it = {name for name, function in vars(native).items() if getattr(function, "__module__", "") == native.__name__}
    functions = of_it & set(vars(Kernels))
    assert {name.partition(",")[0] for name in calls()} == functions


def flat(results) -> list[Tensor]:
    if isinstance(results, (list, tuple)):
        return [tensor for result in results for tensor in flat(result)]
    return [results if isinstance(results, Tensor) else torch.tensor(results, dtype=torch.float64)]


@native
@layouts
def test_calls(layout):
    """All tensors of a call in one layout, and each of them alone."""
    for name, (call, tensors) in calls().items():
        expected = flat(call(*tensors))
        for some in (range(len(tensors)), *[[i] for i in range(len(tensors))]):
            lying = [laid_out(tensor, layout) if i in some else tensor for i, tensor in enumerate(tensors)]
            for value, right in zip(flat(call(*lying)), expected, strict=True):
                assert_close(value, right, 1e-12, f"{name}, tensors {list(some)}")


@native
def test_calls_convert_other_dtypes():
    """Of those arguments that a kernel reads in one dtype alone."""
    single = {
        "flow_step_forward": [1, 2],
        "flow_step_backward": [1, 4],
        "step_network_forward": [0, 2, 3, 4, 5, 6],
        "step_network_layers": [0, 2, 3, 4, 5, 6],
        "conv3x3_forward": [1, 2],
        "conv3x3_backward": [1, 2, 3],
        "affine_backward": [1],
        "inverse_logdet": [0],
        "fold_forward": [0, 1, 2],
        "fold_forward, stacked": [0, 1, 2],
        "fold_backward": [0, 1, 2, 3, 4],
        "fold_backward, stacked": [0, 1, 2, 3, 4],
    }
    for name, positions in single.items():
        call, tensors = calls()[name]
        for dtype in (torch.float32, torch.bfloat16):
            others = [tensor.to(dtype) if i in positions else tensor for i, tensor in enumerate(tensors)]
            expected = flat(call(*(tensor.double() for tensor in others)))
            for value, right in zip(flat(call(*others)), expected, strict=True):
                # the gradient of a parameter comes in its dtype; of parameters in bfloat16, the folding keeps float32
                coarse = torch.float32 if "fold_backward" in name and value.dtype == torch.float64 else value.dtype
                assert_close(value, right, ROUNDING[coarse], name)


@native
def test_outputs_are_written_where_they_lie():
    """`out` of a convolution among NaN, which stay."""
    from ncsr_fast.ops import native as c

    image, weight = normal(2, 7, 4, 6), normal(9, 7, 3, 3)
    expected = c.conv3x3_forward(image, weight, None)
    for layout in ("contiguous", "channels_last", "offset", "reversed", "sliced", "channels of channels_last"):
        out = laid_out(torch.zeros_like(expected), layout)
        around = torch.as_strided(out, (out.untyped_storage().nbytes() // 8,), (1,), 0)
        nans = int(around.isnan().sum())
        assert c.conv3x3_forward(image, weight, None, out=out) is out
        assert torch.equal(out, expected), layout
        assert int(around.isnan().sum()) == nans


@native
def test_what_has_no_memory_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    from ncsr_fast.ops import native as c

    x, mix, offset = normal(2, 6, 3, 5), normal(6, 6), normal(6)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(mix)
    for bad in (fake, TwoTensor(mix, mix)):
        with pytest.raises(TypeError, match="may have none: use backend='reference'"):
            c.flow_step_forward(x, bad, offset, None, None, 1e-4, False)
    with pytest.raises(TypeError, match="this tensor is on meta"):
        c.flow_step_forward(x, mix.to("meta"), offset, None, None, 1e-4, False)
    dy, image, weight = normal(2, 9, 4, 6), normal(2, 7, 4, 6), normal(9, 7, 3, 3)
    with pytest.raises(ValueError, match="must have dense 3×3"):
        c.conv3x3_backward(dy, image, weight, (False, True, False), dweight=weight.to(memory_format=torch.channels_last))
    with pytest.raises(TypeError, match="negative bit"):
        c.conv3x3_forward(image, weight, None, out=torch._neg_view(normal(2, 9, 4, 6)))
    with pytest.raises(TypeError, match="the kernel writes torch.float64 here, but this tensor is torch.float32"):
        c.conv3x3_forward(image, weight, None, out=normal(2, 9, 4, 6, dtype=torch.float32))
    with pytest.raises(TypeError, match="the kernel writes torch.float64 here, but this tensor is torch.float32"):
        c.conv3x3_backward(dy, image, weight, (False, True, False), dweight=weight.float())


def test_known_zeros_are_read_as_zeros():
    """What forward-mode differentiation puts in place of a gradient that is zero: a tensor with an address of 0."""
    _, h = arguments("affine_injector")
    zeros = torch._efficientzerotensor((2, 6, 2, 3), dtype=torch.float64)
    y, _ = ops.affine_injector(zeros, h)
    assert torch.equal(y, ops.affine_injector(torch.zeros(2, 6, 2, 3, dtype=torch.float64), h)[0])


def test_addresses_are_taken_in_one_place():
    """`data_ptr()` reads memory that a tensor may not have in that form; elsewhere it tells tensors apart."""
    found = set()
    for folder in map(Path, ncsr_fast.__path__):
        for path in folder.rglob("*.py"):
            found |= {(path.name, line.strip()) for line in path.read_text().splitlines() if re.search(r"data_ptr\(", line)}
    assert {name for name, _ in found} <= {"passing.py", "cache.py", "graphs.py", "published.py", "ahead_of_time.py"}
    ours = {line for name, line in found if name == "passing.py"}
    assert len(ours) == 2 and any(line == "address = tensor.data_ptr()" for line in ours), "of arguments, and of a workspace"
