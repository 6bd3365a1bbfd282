"""The hoisted convolution's Triton kernels on their own, against its definition in float64: on a GPU, or in the interpreter."""

from __future__ import annotations

import random

import installation
import pytest
import torch
import torch.nn.functional as F
from operator_cases import marked
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels  # noqa: E402
from ncsr_fast.kernels import _conv3x3_weight, _hoisting_weight, conv3x3, hoisting  # noqa: E402
from ncsr_fast.ops import reference  # noqa: E402

pytestmark = pytest.mark.slow  # in `make check` the engine hoists by other ways
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, HALF = torch.float32, torch.float16  # the interpreter multiplies bfloat16 wrongly
LAST = torch.channels_last
ALL = (True, True, True)
NAMES = ("own", "stacked", "weight", "bias")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write starts as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


def rounding(terms: int, dtype: torch.dtype) -> float:
    """What rounding may do to sums of so many products, beside the largest of them.

    Some ½√n eps in all of float32, by half an eps an addition that goes up or down as it comes, and 4 for the bias and sums of
    weights. Half precision rounds the result, and, of weights that are sums of up to nine, each: half an eps, which in a sum of
    products that go up or down is no more than half an eps of it.
    """
    return (terms**0.5 / 2 + 4) * torch.finfo(SINGLE).eps + (torch.finfo(dtype).eps if dtype != SINGLE else 0)


def assert_close(value: Tensor, expected: Tensor, terms: int, what: str) -> None:
    assert value.shape == expected.shape, what
    error = float((value.double() - expected).abs().max() / expected.abs().max())
    assert error <= rounding(terms, value.dtype), f"{what}: {error:.1e}"  # also red for NaN


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = SINGLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def exact(own: Tensor, stacked: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y of the definition in float64 and, by autograd, the gradients of all four."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (own, stacked, weight, bias)]
    large = F.interpolate(leaves[1], scale_factor=own.shape[2] // stacked.shape[2], mode="nearest")
    y = F.conv2d(torch.cat([leaves[0], large], dim=1), leaves[2], leaves[3], padding=1)
    return y.detach(), torch.autograd.grad(y, leaves, dy.double())


class Case:
    """A call drawn by a seed: channels, odd sizes, layouts, parts of wider buffers."""

    def __init__(self, factor: int, dtype: torch.dtype, seed: int) -> None:
        self.random = random.Random(100 * factor + seed)
        pick = self.random.choice
        self.dtype, self.batch, (height, width) = dtype, pick([1, 2]), pick([(1, 1), (2, 3), (1, 5), (3, 2)])
        self.groups, channels, inputs, of_group = pick([1, 2, 3]), pick([1, 3, 16, 20]), pick([2, 5, 16, 33]), pick([2, 5, 16])
        outputs, size = self.groups * of_group, (factor * height, factor * width)
        self.own, self.stacked = self.image(channels, size), self.image(inputs, (height, width))
        self.dy = self.image(outputs, size)
        weight = normal(outputs, channels + inputs, 3, 3, seed=seed).to(dtype)
        self.weight = weight.contiguous(memory_format=pick([LAST, torch.contiguous_format])) / (9 * (channels + inputs)) ** 0.5
        self.bias = normal(outputs, seed=seed)

    def image(self, channels: int, size: tuple[int, int]) -> Tensor:
        """Random numbers, NaN around them, in a layout as it comes."""
        layout = self.random.choice(["last", "slice", "contiguous", "view"])
        before, rows = (3 if layout == "slice" else 0), (2 if layout == "view" else 0)
        wide = torch.full((self.batch, channels + 2 * before, size[0] + rows, size[1] + rows), torch.nan)
        wide = wide.to(DEVICE, self.dtype, memory_format=torch.contiguous_format if layout == "contiguous" else LAST)
        view = wide[:, before : before + channels, : size[0], : size[1]]
        return view.copy_(normal(self.batch, channels, *size, seed=self.random.randrange(1000)))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
@marked("exhaustive", lambda seed, factor, dtype: (seed, factor, dtype) not in ((1, 2, HALF), (4, 3, SINGLE)))  # small ones
def test_any_call(seed, factor, dtype):
    case = Case(factor, dtype, seed)
    tensors = case.own, case.stacked, case.weight
    expected, gradients = exact(*tensors, case.bias, case.dy)
    images = kernels.hoisted_forward(*tensors, case.bias, groups=case.groups)
    assert all(image.is_contiguous(memory_format=LAST) and image.dtype == dtype for image in images)
    inputs, outputs, pixels = case.weight.shape[1], len(case.weight), case.dy[:, 0].numel()
    for image, right in zip(images, expected.chunk(case.groups, dim=1), strict=True):
        assert_close(image, right, 9 * inputs, "y")
    found = kernels.hoisted_backward(case.dy, *tensors, ALL)
    assert [value.dtype for value in found] == [dtype] * 4
    terms = 9 * outputs, 9 * outputs * factor**2, pixels, pixels
    for name, value, right, count in zip(NAMES, found, gradients, terms, strict=True):
        assert_close(value, right, count, name)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_the_reference_is_the_definition(factor):
    own, stacked = normal(2, 3, 2 * factor, 3 * factor).double(), normal(2, 5, 2, 3).double()
    weight, bias, dy = normal(4, 8, 3, 3).double(), normal(4).double(), normal(2, 4, 2 * factor, 3 * factor).double()
    expected, gradients = exact(own, stacked, weight, bias, dy)
    images = reference.hoisted_forward(own, stacked, weight, bias, groups=2)
    found = reference.hoisted_backward(dy, own, stacked, weight, ALL)
    for value, right in zip([torch.cat(images, dim=1), *found], [expected, *gradients], strict=True):
        assert float((value - right).abs().max() / right.abs().max()) < 1e-13
    assert reference.hoisted_backward(dy, own, stacked, weight, (False, False, True))[:2] == (None, None)


def launches(monkeypatch, call) -> list[str]:
    started = []
    for module in (conv3x3, _conv3x3_weight, _hoisting_weight, hoisting):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: started.append(kernel.fn.__name__))
    call()
    return started


def test_launches_and_what_is_needed(monkeypatch):
    """Two a level forward; backward one for each gradient of features, and four for those of the parameters."""
    own, stacked, weight, bias = normal(1, 3, 2, 2), normal(1, 5, 1, 1), normal(4, 8, 3, 3), normal(4)
    forward = launches(monkeypatch, lambda: kernels.hoisted_forward(own, stacked, weight, bias, groups=4))
    assert forward == ["weights_by_slot_kernel", "hoisted_kernel"]
    sums = ["conv3x3_weight_kernel", "sum_weight_partials_kernel", "hoisted_weight_kernel", "sum_slots_kernel"]
    of_each = {(True, False, False): ["conv3x3_kernel"], (False, True, False): ["hoisted_backward_kernel"]}
    of_each |= {(False, False, True): sums, ALL: ["conv3x3_kernel", "hoisted_backward_kernel", *sums]}
    for needed, kernel_names in of_each.items():
        dy, found = normal(1, 4, 2, 2), []
        call = lambda dy=dy, needed=needed, found=found: found.extend(  # noqa: E731
            kernels.hoisted_backward(dy, own, stacked, weight, needed)
        )
        assert launches(monkeypatch, call) == ["weights_by_slot_kernel", *kernel_names]
        assert [value is not None for value in found] == [*needed, needed[2]]


@pytest.mark.parametrize("factor", [1, 4])
def test_the_same_bits_and_any_number_of_parts(factor, monkeypatch):
    """The gradients of weights over one part of all cells, and two, of which the second has less: of three samples.

    With one phase every slot is of its own, and with four those between have several.
    """
    own, stacked, dy = normal(3, 2, factor, 2 * factor), normal(3, 2, 1, 2), normal(3, 2, factor, 2 * factor, seed=1)
    # behind the last sample, where a sum without an end would read on
    stacked, dy = (torch.cat([x, torch.full_like(x[:1], torch.nan)])[:3] for x in (stacked, dy))
    weight, bias = normal(2, 4, 3, 3), normal(2)
    y, gradients = exact(own, stacked, weight, bias, dy)
    assert_close(kernels.hoisted_forward(own, stacked, weight, bias)[0], y, 36, "y")
    for programs in (1, 2 * _hoisting_weight.slots(factor) ** 2):
        monkeypatch.setattr(_hoisting_weight, "PROGRAMS", programs)
        first, second = (kernels.hoisted_backward(dy, own, stacked, weight, (False, False, True))[2:] for _ in range(2))
        assert all(map(torch.equal, first, second))
        for value, right in zip(first, gradients[2:], strict=True):
            assert_close(value, right, dy[:, 0].numel(), "parameters")


def far(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype = HALF) -> Tensor:
    """Numbers in memory that is reserved, and of which only they are touched."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    x = torch.tensor([], dtype=dtype, device=DEVICE)
    x.set_(torch.UntypedStorage(reach * x.element_size(), device=DEVICE), 0, shape, strides)
    return x.copy_(normal(*shape))


@pytest.mark.parametrize("which", ["own", pytest.param("stacked", marks=pytest.mark.exhaustive)])
def test_offsets_beyond_32_bits(which):
    """Rows 2³⁰ elements apart, a stride of 32 bits whose double is not."""
    near = {"own": normal(1, 2, 4, 4, dtype=HALF), "stacked": normal(1, 2, 2, 2, dtype=HALF)}
    weight, bias = normal(3, 4, 3, 3, dtype=HALF), normal(3)
    beyond = dict(near)
    beyond[which] = far(tuple(near[which].shape), (9, 1, 2**30, 2)).copy_(near[which])
    (expected,), (found,) = (kernels.hoisted_forward(*each.values(), weight, bias) for each in (near, beyond))
    assert torch.equal(found, expected)
    dy = expected if which == "stacked" else far(tuple(expected.shape), (9, 1, 2**30, 3)).copy_(expected)
    right = kernels.hoisted_backward(expected, *near.values(), weight, ALL)
    assert all(map(torch.equal, kernels.hoisted_backward(dy, *beyond.values(), weight, ALL), right))


def test_empty():
    own, stacked, weight, bias = normal(0, 3, 4, 4), normal(0, 5, 2, 2), normal(4, 8, 3, 3), normal(4)
    first, second = kernels.hoisted_forward(own, stacked, weight, bias, groups=2)
    assert first.shape == second.shape == (0, 2, 4, 4)
    down, dstacked, dweight, dbias = kernels.hoisted_backward(normal(0, 4, 4, 4), own, stacked, weight, ALL)
    assert (down.shape, dstacked.shape) == (own.shape, stacked.shape)
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


def test_what_is_refused():
    arguments = [tensor.double() for tensor in (normal(1, 3, 4, 4), normal(1, 5, 2, 2), normal(4, 8, 3, 3))]
    for call in (
        lambda: kernels.hoisted_forward(*arguments, normal(4).double()),
        lambda: kernels.hoisted_backward(normal(1, 4, 4, 4).double(), *arguments, ALL),
    ):
        with pytest.raises(TypeError, match="own must be float32, float16 or bfloat16"):
            call()
