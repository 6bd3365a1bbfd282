"""The convolution's Triton kernels on their own, against its definition in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import random

import installation
import pytest
import torch
import torch.nn.functional as F
from network_cases import convolved
from support import Watch
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels, ops  # noqa: E402
from ncsr_fast.engine.dense_block import dense_block  # noqa: E402
from ncsr_fast.kernels import _conv3x3, _conv3x3_weight, conv3x3  # noqa: E402
from ncsr_fast.ops.conv3x3 import ConvolutionMethod  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, HALF = torch.float32, torch.float16  # the interpreter multiplies bfloat16 wrongly
ALL = (True, True, True)
CHANNELS = (1, 3, 12, 16, 33, 64)
SEEDS = [pytest.param(seed, marks=() if seed < 4 else pytest.mark.exhaustive) for seed in range(60)]


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


def channels_of(wide: Tensor, first: int, count: int) -> Tensor:
    return wide[:, first : first + count]


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


@pytest.mark.parametrize("seed", SEEDS)
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
