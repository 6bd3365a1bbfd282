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


def fold_arguments() -> list[Tensor]:
    return [normal(6), 0.1 * normal(6), normal(6, 6)]


def of(call, *constants):
    return lambda *tensors: call(*tensors, *constants)


def calls() -> dict:
    """Every function of `ops._native`, as one of tensors, and tensors for it."""
    from ncsr_fast.ops import _native as c

    x, h = normal(2, 6, 3, 5), normal(2, 6, 3, 5)
    image, weight, bias = normal(2, 7, 4, 6), normal(9, 7, 3, 3), normal(9)
    dy, small = normal(2, 9, 4, 6), normal(2, 7, 2, 3)
    step_gradient = [normal(2, 6, 3, 5), normal(2), *step_arguments()[:1], normal(2, 6, 3, 5), *step_arguments()[1:2]]
    hidden = lambda like: tuple(torch.empty_like(like, memory_format=torch.contiguous_format) for _ in range(2))  # noqa: E731
    return {
        "affine_fwd": (of(c.affine_fwd, 3, 1e-4, False), [x, h]),
        "affine_bwd": (of(c.affine_bwd, 3, 1e-4, False), [normal(2, 6, 3, 5), normal(2), x, h]),
        "gaussian_fwd": (of(c.gaussian_fwd, False), [x, h]),
        "gaussian_bwd": (of(c.gaussian_bwd, False), [normal(2, 6, 3, 5), normal(2), x, h]),
        "step_fwd": (of(c.step_fwd, 1e-4, False), step_arguments()),
        "step_bwd": (of(c.step_bwd, 1e-4, False), [*step_gradient, *step_arguments()[3:]]),
        "network_fwd": (c.network_fwd, network_arguments()),
        "network_fwd, hidden": (lambda *t: (h := hidden(t[1]), c.network_fwd(*t, hidden=h))[::-1], network_arguments()),
        "conv3x3_fwd": (lambda *t: c.conv3x3_fwd(*t, slope=0.2), [image, weight, bias]),
        "conv3x3_fwd, copies": (lambda *t: c.conv3x3_fwd(*t, None, copies=True), [image, weight]),
        "conv3x3_bwd_input": (
            lambda dy, weight, gate: c.conv3x3_bwd_input(dy, weight, gate=gate, slope=0.2),
            [dy, weight, normal(2, 3, 4, 6)],
        ),
        "conv3x3_bwd_weight": (c.conv3x3_bwd_weight, [dy, image]),
        "conv3x3_bwd_weight, copies": (lambda *t: c.conv3x3_bwd_weight(*t, copies=True), [dy, small]),
        "fold": (lambda *t: c.fold("fold", *t, False, torch.float64), fold_arguments()),
        "fold_backward": (
            lambda *t: c.fold_backward(*t[:3], False, *t[3:]), [*fold_arguments(), normal(6, 6), normal(6), normal(1)],
        ),
    }  # fmt: skip


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
    single = {"step_fwd": [1, 2], "step_bwd": [1, 4], "network_fwd": [0, 2, 3, 4, 5, 6], "conv3x3_fwd": [1, 2],
              "conv3x3_bwd_input": [1, 2], "conv3x3_bwd_weight": [1], "affine_bwd": [1], "fold": [0, 1, 2],
              "fold_backward": [0, 1, 2, 3, 4]}  # fmt: skip
    for name, positions in single.items():
        call, tensors = calls()[name]
        for dtype in (torch.float32, torch.bfloat16):
            others = [tensor.to(dtype) if i in positions else tensor for i, tensor in enumerate(tensors)]
            expected = flat(call(*(tensor.double() for tensor in others)))
            for value, right in zip(flat(call(*others)), expected, strict=True):
                # the gradient of a parameter comes in its dtype; of parameters in bfloat16, the folding keeps float32
                coarse = torch.float32 if name == "fold_backward" and value.dtype == torch.float64 else value.dtype
                assert_close(value, right, ROUNDING[coarse], name)


@native
def test_outputs_are_written_where_they_lie():
    """`out` of a convolution among NaN, which stay."""
    from ncsr_fast.ops import _native as c

    image, weight = normal(2, 7, 4, 6), normal(9, 7, 3, 3)
    expected = c.conv3x3_fwd(image, weight, None)
    for layout in ("contiguous", "channels_last", "offset", "reversed", "sliced", "channels of channels_last"):
        out = laid_out(torch.zeros_like(expected), layout)
        around = torch.as_strided(out, (out.untyped_storage().nbytes() // 8,), (1,), 0)
        nans = int(around.isnan().sum())
        assert c.conv3x3_fwd(image, weight, None, out=out) is out
        assert torch.equal(out, expected), layout
        assert int(around.isnan().sum()) == nans


@native
def test_what_has_no_memory_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    from ncsr_fast.ops import _native as c

    x, mix, offset = normal(2, 6, 3, 5), normal(6, 6), normal(6)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(mix)
    for bad in (fake, TwoTensor(mix, mix)):
        with pytest.raises(TypeError, match="may have none: use backend='reference'"):
            c.step_fwd(x, bad, offset, None, None, 1e-4, False)
    with pytest.raises(TypeError, match="this tensor is on meta"):
        c.step_fwd(x, mix.to("meta"), offset, None, None, 1e-4, False)
    dy, image = normal(2, 9, 4, 6), normal(2, 7, 4, 6)
    with pytest.raises(ValueError, match="must have dense 3×3"):
        c.conv3x3_bwd_weight(dy, image, out=normal(9, 7, 3, 3).to(memory_format=torch.channels_last))
    with pytest.raises(TypeError, match="negative bit"):
        c.conv3x3_fwd(image, normal(9, 7, 3, 3), None, out=torch._neg_view(normal(2, 9, 4, 6)))


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
    assert {name for name, _ in found} <= {"_native.py", "cache.py", "graphs.py", "published.py", "ahead_of_time.py"}
    assert [line for name, line in found if name == "_native.py"] == ["return x.data_ptr()"]
