"""The convolution's Triton kernels on their own, against its definition in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import random

import installation
import pytest
import torch
import torch.nn.functional as F
from network_cases import convolved
from operator_cases import marked
from support import Watch
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels, ops  # noqa: E402
from ncsr_fast.engine.dense_block import dense_block  # noqa: E402
from ncsr_fast.kernels import _conv3x3, _conv3x3_weight, conv3x3  # noqa: E402
from ncsr_fast.ops.conv3x3 import ConvolutionMethod  # noqa: E402

pytestmark = pytest.mark.slow  # in `make check` the tests of the operators run these kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, HALF = torch.float32, torch.float16  # the interpreter multiplies bfloat16 wrongly
ALL = (True, True, True)
CHANNELS = (1, 3, 12, 16, 33, 64, 192)


def rounding(terms: int, dtype: torch.dtype) -> float:
    """What rounding may do to sums of so many products, beside the largest of them.

    Each addition in float32 rounds a partial sum by half an eps at most, up or down as it comes: some ½√n eps in all, and 4
    for the bias, the leaky ReLU and what is added to. The result is rounded once to its dtype. Products of numbers of half
    precision are exact in float32.
    """
    return (terms**0.5 / 2 + 4) * torch.finfo(SINGLE).eps + (torch.finfo(dtype).eps / 2 if dtype != SINGLE else 0)


def assert_close(value: Tensor, expected: Tensor, terms: int, what: str) -> None:
    assert value.shape == expected.shape, what
    error = (value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30) if expected.numel() else 0
    assert error <= rounding(terms, value.dtype), f"{what}: {float(error):.1e}"  # also false for NaN


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = SINGLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, upsample2x: bool) -> Tensor:
    """The convolution, differentiable, in float64."""
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if upsample2x else x
    return convolved(x, weight, bias)


def gradients(dy: Tensor, x: Tensor, weight: Tensor, upsample2x: bool) -> tuple[Tensor, ...]:
    """Of x, weight and bias, by autograd of the definition in float64."""
    bias = torch.zeros(len(weight), dtype=torch.float64, device=x.device)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    return torch.autograd.grad(oracle(*leaves, upsample2x), leaves, dy.double())


class Case:
    """A call drawn by a seed: channels, odd sizes, layouts, parts of wider buffers, and options."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        self.dtype, self.upsample2x = pick([SINGLE, HALF]), pick([False, False, True])
        self.inputs, self.outputs = pick(CHANNELS), pick(CHANNELS)
        self.batch, self.size = pick([1, 2, 3]), (pick([1, 2, 3, 5, 8]), pick([1, 2, 5, 7, 17]))
        self.slope, self.accumulate, self.biased = pick([1.0, 0.2, 0.0]), pick([False, True]), pick([False, True])
        factor = 2 if self.upsample2x else 1
        self.large = tuple(factor * side for side in self.size)

    def image(self, channels: int, size: tuple[int, int]) -> Tensor:
        """Random numbers, NaN around them, in a layout as it comes."""
        height, width = size
        layout = self.random.choice(["last", "prefix", "slice", "contiguous", "view", "view of last"])
        before, after = {"prefix": (0, 7), "slice": (5, 2)}.get(layout, (0, 0))
        rows, columns = (2, 3) if "view" in layout else (0, 0)
        wide = torch.full((self.batch, before + channels + after, height + rows, width + columns), torch.nan)
        wide = wide.to(DEVICE, self.dtype)
        if layout not in ("contiguous", "view"):
            wide = wide.contiguous(memory_format=torch.channels_last)
        view = wide[:, before : before + channels, rows // 2 : rows // 2 + height, :width]
        return view.copy_(normal(self.batch, channels, height, width, seed=self.random.randrange(1000)))

    def weight(self) -> Tensor:
        """In any dtype and layout, or some inputs of one that is wider."""
        wide = normal(self.outputs, self.inputs + 5, 3, 3, seed=self.random.randrange(1000)) / (9 * self.inputs) ** 0.5
        wide = wide.to(self.random.choice([SINGLE, self.dtype]))
        if self.random.random() < 0.5:
            wide = wide.contiguous(memory_format=torch.channels_last)
        return wide[:, 2 : 2 + self.inputs] if self.random.random() < 0.5 else wide[:, : self.inputs].clone()


def surroundings(view: Tensor) -> Tensor:
    """What memory holds around a view, NaN as a number."""
    every = torch.as_strided(view, (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    beside = torch.ones_like(every, dtype=torch.bool)
    torch.as_strided(beside, view.shape, view.stride(), view.storage_offset()).fill_(False)
    return every[beside].nan_to_num(7.5)


@pytest.mark.parametrize("seed", range(40))
@marked("exhaustive", lambda seed: seed not in (2, 9, 16))  # small ones of both dtypes, one upsampled
def test_any_call(seed):
    """Values, with what is added to and the leaky ReLU, and gradients, with the gate; nothing around the results is written."""
    case = Case(seed)
    x, out, weight = case.image(case.inputs, case.size), case.image(case.outputs, case.large), case.weight()
    bias = normal(case.outputs) if case.biased else None
    rounded = weight.to(case.dtype).double()  # as a kernel multiplies it
    y = oracle(x.double(), rounded, None if bias is None else bias.double(), case.upsample2x)
    expected = F.leaky_relu(y, case.slope) + (out.double() if case.accumulate else 0)
    around, options = surroundings(out), {"upsample2x": case.upsample2x}
    found = kernels.conv3x3_forward(x, weight, bias, slope=case.slope, out=out, accumulate=case.accumulate, **options)
    assert found is out and torch.equal(surroundings(out), around)
    assert_close(out, expected, 9 * case.inputs, "y")

    dy, dx = case.image(case.outputs, case.large), case.image(case.inputs, case.size)
    gated = case.random.randrange(case.inputs)
    relu = case.image(case.inputs - gated, case.size)
    if case.slope == 0:
        relu.clamp_(min=0)  # as a ReLU leaves it: its derivative at 0 is that of negative numbers
    expected = gradients(dy, x, rounded, case.upsample2x)
    whole = expected[0] + (dx.double() if case.accumulate else 0)
    gate = torch.where(relu > 0, 1.0, case.slope).double()
    right = torch.cat([whole[:, :gated], whole[:, gated:] * gate], dim=1)
    given = dx if case.accumulate else None
    around = surroundings(dx)
    found = kernels.conv3x3_backward(dy, x, weight, ALL, dx=given, relu=(relu, case.slope), **options)
    assert (found[0] is dx) == case.accumulate and torch.equal(surroundings(dx), around)
    assert_close(found[0], right, 9 * case.outputs * (4 if case.upsample2x else 1), "dx")
    for value, other, what in zip(found[1:], expected[1:], ("dweight", "dbias")):
        assert value.dtype == SINGLE
        assert_close(value, other, dy[:, 0].numel(), what)


def launches(monkeypatch, call) -> tuple[list[str], set[str]]:
    """The kernels that a call starts, in their order, and the operators of PyTorch that compute."""
    started, computed = [], set()
    for module in (conv3x3, _conv3x3, _conv3x3_weight):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: started.append(kernel.fn.__name__))
    with Watch(lambda name, _: computed.add(name)):
        call()
    return started, {
        name for name in computed if name not in ("aten::empty", "aten::slice", "aten::select", "aten::alias", "aten::detach")
    }


def test_launches_of_a_dense_block(monkeypatch):
    """A launch a convolution, and one for the weights of all; beside them x is copied to the buffer and y added to it."""
    growth = [(8 + 4 * index, 4 if index < 4 else 8) for index in range(5)]
    pairs = [(normal(outputs, inputs, 3, 3).requires_grad_(), normal(outputs).requires_grad_()) for inputs, outputs in growth]
    x = normal(2, 8, 3, 4, dtype=HALF).contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = []

    def forward() -> None:
        outputs.append(dense_block(x, pairs, 0.2, 0.2, ConvolutionMethod(backend="triton")))

    started, computed = launches(monkeypatch, forward)
    assert started == ["copy_weights_kernel", *["conv3x3_kernel"] * 5]
    assert computed == {"aten::copy_", "aten::add"}
    started, computed = launches(monkeypatch, lambda: outputs[0].backward(torch.ones_like(x)))
    backward = ["conv3x3_kernel", "conv3x3_weight_kernel", "sum_weight_partials_kernel"]
    assert started == ["copy_weights_kernel", *backward * 5]
    assert computed == {"aten::ones_like", "aten::mul", "aten::add"}


@pytest.mark.parametrize("dtype", [SINGLE, pytest.param(HALF, marks=pytest.mark.exhaustive)], ids=str)
def test_a_dense_block_is_its_definition(dtype):
    """In its buffer: each convolution reads what the ones before wrote, and their gradients are added up there."""
    growth = [(8 + 4 * index, 4 if index < 2 else 8) for index in range(3)]
    pairs = [(normal(n, c, 3, 3) / (9 * c) ** 0.5, normal(n)) for c, n in growth]
    x, method = (
        normal(1, 8, 3, 4, dtype=dtype).contiguous(memory_format=torch.channels_last),
        ConvolutionMethod(backend="triton"),
    )
    results = []
    for chosen, precision in ((method, dtype), (None, torch.float64)):
        leaves = [x.detach().to(precision).requires_grad_()]
        parameters = [
            tensor.to(dtype).to(SINGLE if chosen else precision).requires_grad_() for pair in pairs for tensor in pair
        ]
        y = dense_block(leaves[0], list(zip(parameters[::2], parameters[1::2])), 0.2, 0.2, chosen)
        results.append([y, *torch.autograd.grad(y, [*leaves, *parameters], torch.ones_like(y))])
    for value, expected in zip(*results):
        # three layers, the later of which read what the former rounded; ReLUs of what is nearly zero are not among these
        error = (value.double() - expected).abs().max() / expected.abs().max()
        assert error <= 3 * rounding(9 * 16, dtype) + (0 if dtype == SINGLE else 3 * torch.finfo(dtype).eps)


def test_gradients_by_finite_differences():
    """Of a product with the output, in float32: along a line of x, weight and bias it is quadratic, so that central differences
    of any length are exact."""
    start = [normal(1, 3, 3, 4, seed=1), normal(12, 3, 3, 3, seed=2) / 27**0.5, normal(12, seed=3)]
    way = [normal(*tensor.shape, seed=4) / (27**0.5 if index == 1 else 1) for index, tensor in enumerate(start)]
    dy = normal(1, 12, 3, 4, seed=5)

    def value(distance: float) -> float:
        y = kernels.conv3x3_forward(*(x + distance * step for x, step in zip(start, way)))
        return float((y.double() * dy.double()).sum())

    gradients = kernels.conv3x3_backward(dy, *start[:2], ALL)
    slope = sum(float((gradient.double() * step.double()).sum()) for gradient, step in zip(gradients, way))
    scale = float(dy.norm()) * float(kernels.conv3x3_forward(*way).norm())
    assert abs((value(1.0) - value(-1.0)) / 2 - slope) <= 8 * rounding(27, SINGLE) * scale


@pytest.mark.parametrize("upsample2x", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_same_bits_and_any_number_of_parts(monkeypatch, upsample2x):
    """The weight gradient over one part of all tiles, and two, of which the second has less; the last tile is not whole."""
    factor = 2 if upsample2x else 1
    x, dy = normal(1, 3, 5, 7), normal(1, 4, 5 * factor, 7 * factor)
    weight = normal(4, 3, 3, 3)
    monkeypatch.setitem(_conv3x3_weight.OPTIONS["ieee"], "BLOCK_P", 16)
    expected = gradients(dy, x, weight, upsample2x)
    for programs in (1, 9 * 2):
        monkeypatch.setattr(_conv3x3_weight, "PROGRAMS", programs)
        first, second = (kernels.conv3x3_backward(dy, x, weight, (False, True, True), upsample2x=upsample2x) for _ in range(2))
        assert first[0] is None and all(map(torch.equal, first[1:], second[1:]))
        assert_close(first[1], expected[1], dy[:, 0].numel(), "dweight")
        assert_close(first[2], expected[2], dy[:, 0].numel(), "dbias")


def test_gradients_where_and_in_which_dtype_they_are_wanted():
    """Some inputs of a wider gradient, whose other inputs are not written; in the operator the dtype of each parameter."""
    x, weight, dy = normal(1, 3, 2, 3, dtype=HALF), normal(4, 3, 3, 3), normal(1, 4, 2, 3, dtype=HALF)
    expected = gradients(dy, x, weight, False)[1]
    for dtype, layout in ((SINGLE, torch.contiguous_format), (HALF, torch.channels_last)):
        wide = torch.full((4, 8, 3, 3), 7.5, device=DEVICE, dtype=dtype).contiguous(memory_format=layout)
        _, found, _ = kernels.conv3x3_backward(dy, x, weight, (False, True, False), dweight=wide[:, 2:5])
        assert found.data_ptr() == wide[:, 2:5].data_ptr()
        assert_close(wide[:, 2:5], expected, 6, "dweight")
        assert (wide[:, :2] == 7.5).all() and (wide[:, 5:] == 7.5).all()
    leaves = [x.requires_grad_(), weight.requires_grad_(), normal(4).requires_grad_()]
    found = torch.autograd.grad(ops.conv3x3(*leaves, backend="triton"), leaves, dy)
    assert [gradient.dtype for gradient in found] == [HALF, SINGLE, SINGLE]
    assert_close(found[1].half(), expected, 6, "dweight")  # the operator rounds the weight to the dtype of x, and its gradient


def test_weights_are_copied_unless_they_can_be_read(monkeypatch):
    """All by one kernel; some inputs of a weight that is laid out are read where they lie."""
    contiguous = normal(5, 3, 3, 3)
    last = normal(4, 9, 3, 3).contiguous(memory_format=torch.channels_last)
    given = [contiguous, last, last[:, 2:7], contiguous[:, 1:], torch._neg_view(contiguous), last.half()]
    found = kernels.conv3x3_weights(given, SINGLE)
    assert [copy is weight for copy, weight in zip(found, given)] == [False, True, True, False, False, False]
    for copy, weight in zip(found, given):
        assert copy.dtype == SINGLE and copy.stride(1) == 1 and torch.equal(copy, weight.to(SINGLE))
    started, computed = launches(monkeypatch, lambda: kernels.conv3x3_weights(given[:4], HALF))
    assert (started, computed) == (["copy_weights_kernel"], set())
    x = normal(1, 5, 2, 2)
    assert launches(monkeypatch, lambda: kernels.conv3x3_forward(x, last[:, 2:7], None))[0] == ["conv3x3_kernel"]


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Half-precision numbers in memory that is reserved, and of which only they are touched."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    storage = torch.UntypedStorage(2 * reach, device=DEVICE)
    x = torch.tensor([], dtype=HALF, device=DEVICE).set_(storage, 0, shape, strides)
    return x.copy_(normal(*shape))


@pytest.mark.parametrize(
    "shape, strides",
    [
        ((1, 2, 3, 2), (9, 1, 2**30, 2)),
        pytest.param((2, 2, 3, 2), (2**31, 1, 4, 2), marks=pytest.mark.exhaustive),
        pytest.param((1, 48, 2, 2), (9, 2**26, 2, 1), marks=pytest.mark.exhaustive),
    ],
    ids=["rows", "samples", "channels"],
)
def test_offsets_beyond_32_bits(shape, strides):
    """Rows 2³⁰ elements apart, a stride of 32 bits whose double is not; samples 2³¹; blocks of channels that begin there."""
    x, dx, weight = far(shape, strides), far(shape, strides), normal(3, shape[1], 3, 3, dtype=HALF)
    near, before = x.clone(memory_format=torch.contiguous_format), dx.clone(memory_format=torch.contiguous_format)
    expected = kernels.conv3x3_forward(near, weight, None)
    assert torch.equal(kernels.conv3x3_forward(x, weight, None), expected)
    right = kernels.conv3x3_backward(expected, near, weight, ALL, dx=before, relu=(near, 0.2))
    found = kernels.conv3x3_backward(expected, x, weight, ALL, dx=dx, relu=(x, 0.2))
    assert all(map(torch.equal, found, right))


def test_offsets_of_upsampled_rows_beyond_32_bits():
    """The gradient of a pixel reads two rows further, twice a stride of 32 bits."""
    dy, x, weight = far((1, 2, 4, 2), (9, 1, 2**30, 2)), normal(1, 2, 2, 1, dtype=HALF), normal(2, 2, 3, 3, dtype=HALF)
    near = dy.clone(memory_format=torch.contiguous_format)
    found, expected = (
        kernels.conv3x3_backward(each, x, weight, (True, False, False), upsample2x=True)[0] for each in (dy, near)
    )
    assert torch.equal(found, expected)


def test_nan_stays_with_its_neighbours():
    x, weight = normal(2, 3, 5, 6), normal(4, 3, 3, 3)
    x[0, 1, 2, 3] = torch.nan
    y = kernels.conv3x3_forward(x, weight, None, slope=0.2)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, :, 1:4, 2:5] = True
    assert torch.equal(y.isnan(), reached)


def test_accumulation_without_out_starts_at_zero():
    x, weight = normal(1, 3, 2, 2), normal(4, 3, 3, 3)
    found = kernels.conv3x3_forward(x, weight, None, accumulate=True)
    assert torch.equal(found, kernels.conv3x3_forward(x, weight, None))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=["no-sample", "no-row"])
def test_empty(shape):
    x, weight = normal(*shape), normal(4, 3, 3, 3)
    y = kernels.conv3x3_forward(x, weight, None)
    assert y.shape == (shape[0], 4, *shape[2:])
    dx, dweight, dbias = kernels.conv3x3_backward(y, x, weight, ALL)
    assert dx.shape == x.shape and torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros(4).to(x))


def test_what_is_refused():
    x, weight, dy = normal(1, 3, 2, 2).double(), normal(4, 3, 3, 3), normal(1, 4, 2, 2)
    for call in (
        lambda: kernels.conv3x3_forward(x, weight, None),
        lambda: kernels.conv3x3_backward(dy.double(), x, weight, ALL),
        lambda: kernels.conv3x3_backward(dy.double(), x, weight, (False, True, False)),
    ):
        with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
            call()
    negative = torch._neg_view(dy)
    with pytest.raises(TypeError, match="a kernel cannot write to a tensor with a negative bit"):
        kernels.conv3x3_forward(x.float(), weight, None, out=negative)
    with pytest.raises(TypeError, match="a kernel cannot write to a tensor with a negative bit"):
        kernels.conv3x3_backward(dy, x.float(), weight, (False, True, False), dweight=torch._neg_view(weight.clone()))
