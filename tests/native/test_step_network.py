"""The network of an injector or a coupling, three convolutions in one kernel: against PyTorch's convolutions in float64."""

from __future__ import annotations

import sys

import installation
import pytest
import torch
import torch.nn.functional as F
from layouts import IMAGES, LAYOUTS
from operator_cases import assert_close, pairwise_but_on_the_widest
from support import fresh_process
from torch import Tensor

if not installation.expects("native"):
    pytest.skip("the native backend is not among the cells", allow_module_level=True)

from ncsr_fast import ops
from ncsr_fast.ops.native import step_network_forward, step_network_layers

LAST = torch.channels_last
DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def network(
    pass_through: int, hidden: int, outputs: int, size=(5, 7), batch: int = 2, dtype=torch.float64
) -> list[Tensor | None]:
    """z1, pre, w1, w2, b2, w3, b3 with activations of about 1; b2 is positive on average, unlike the zeros around h2."""
    generator = torch.Generator().manual_seed(pass_through + 100 * hidden + outputs)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * variance**0.5).to(dtype)

    z1 = normal(batch, pass_through, *size) if pass_through else None
    w1 = normal(hidden, pass_through, 3, 3, variance=1 / (9 * pass_through)) if pass_through else None
    w2, b2 = normal(hidden, hidden, 1, 1, variance=1 / hidden), 0.5 + normal(hidden)
    w3, b3 = normal(outputs, hidden, 3, 3, variance=1 / (9 * hidden)), normal(outputs)
    return [z1, normal(batch, hidden, *size), w1, w2, b2, w3, b3]


def layers(z1, pre, w1, w2, b2, w3, b3) -> tuple[Tensor, Tensor, Tensor]:
    """h1, h2 and h by the formula."""
    h1 = F.relu(pre if z1 is None else pre + F.conv2d(z1, w1, padding=1))
    h2 = F.relu(F.conv2d(h1, w2, b2))
    return h1, h2, F.conv2d(h2, w3, b3, padding=1)


def formula(*tensors) -> Tensor:
    return layers(*tensors)[2]


def assert_like_the_formula(tensors: list[Tensor | None], name: str = "h") -> None:
    z1, pre, *_, w3, _ = tensors
    value = step_network_forward(*tensors)
    assert value.dtype == pre.dtype
    assert value.is_contiguous(memory_format=LAST)
    h1, h2, h = step_network_layers(*tensors)
    assert torch.equal(h, value)
    # two float64 results, of sums in different orders
    allowed = 1e-13
    if pre.dtype == torch.float32:
        # Each of n additions rounds a partial sum, which is no larger than the largest result, by half an eps at most, up or
        # down as it comes: some ½√n eps in all. Twice that, for three sums after one another.
        longest = max(9 * w3.shape[1], 9 * (0 if z1 is None else z1.shape[1]), 9)
        allowed = longest**0.5 * torch.finfo(torch.float32).eps
    expected = layers(*(None if tensor is None else tensor.double() for tensor in tensors))
    for what, found, right in zip(("h1", "h2", "h"), (h1, h2, h), expected):
        assert_close(found, right, allowed, f"{name}: {what}")


def test_recorded_gradients_are_not_lost():
    leaves = [tensor.requires_grad_() for tensor in network(6, 8, 4)]
    h = ops.step_network(*leaves, backend="native")
    for found, expected in zip(
        torch.autograd.grad(h.sin().sum(), leaves), torch.autograd.grad(formula(*leaves).sin().sum(), leaves)
    ):
        assert_close(found, expected, 1e-13, "gradient")


@dtypes
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (6, 6), (9, 13), (3, 33)], ids=str)
@pytest.mark.parametrize("pass_through", [0, 6])
def test_sizes(instruction_set, dtype, size, pass_through):
    assert_like_the_formula(network(pass_through, 64, 12, size, dtype=dtype))


@dtypes
@pytest.mark.parametrize(
    "pass_through, hidden, outputs",
    [(1, 1, 1), (3, 5, 2), (6, 32, 12), (12, 64, 24), (5, 33, 7), (0, 70, 49), (48, 64, 96), (3, 65, 192), (96, 64, 192)],
)
def test_channels(instruction_set, dtype, pass_through, hidden, outputs):
    """Whole vectors, none, and all numbers of them in the last panel of columns."""
    assert_like_the_formula(network(pass_through, hidden, outputs, (4, 9), dtype=dtype))


@dtypes
@pytest.mark.parametrize(
    "pass_through, outputs, size",
    # pieces are 96 pixels at most and 14 of 384 outputs: some rows each, a row, and parts of a row
    [(6, 12, (12, 20)), (6, 12, (3, 96)), (6, 12, (4, 97)), (0, 5, (2, 289)), (3, 384, (2, 31)), (0, 384, (5, 13))],
)
def test_pieces_of_an_image(instruction_set, dtype, pass_through, outputs, size):
    assert_like_the_formula(network(pass_through, 64, outputs, size, batch=1, dtype=dtype))


@pairwise_but_on_the_widest(z1_layout=[*IMAGES, "none"], pre_layout=IMAGES, hidden=[32, 33], dtype=DTYPES)
@dtypes
@pytest.mark.parametrize("hidden", [32, 33])
@pytest.mark.parametrize("pre_layout", IMAGES)
@pytest.mark.parametrize("z1_layout", [*IMAGES, "none"])
def test_layouts(instruction_set, dtype, hidden, z1_layout, pre_layout):
    """z1 and pre are read at their strides, each in a layout of its own, and no memory around them is."""
    z1, pre, *rest = network(0 if z1_layout == "none" else 6, hidden, 12, (5, 7), dtype=dtype)
    z1 = None if z1 is None else LAYOUTS[z1_layout](z1)
    assert_like_the_formula([z1, LAYOUTS[pre_layout](pre), *rest])


@dtypes
@pytest.mark.parametrize("pass_through", [0, 6])
def test_samples_may_share_pre(instruction_set, dtype, pass_through):
    z1, pre, *rest = network(pass_through, 64, 12, (5, 7), batch=3, dtype=dtype)
    for layout in IMAGES:
        shared = LAYOUTS[layout](pre[:1]).expand(3, -1, -1, -1)
        assert shared.stride(0) == 0
        assert_like_the_formula([z1, shared, *rest])


@dtypes
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty(dtype, shape):
    batch, *size = shape
    for pass_through in (0, 6):
        assert step_network_forward(*network(pass_through, 64, 12, size, batch, dtype)).shape == (batch, 12, *size)


@dtypes
@pytest.mark.parametrize(
    "pass_through, outputs, size, batch", [(6, 12, (40, 40), 1), (0, 24, (17, 80), 3), (48, 96, (20, 20), 1)]
)
def test_the_same_bits_whatever_the_number_of_threads(instruction_set, threads, dtype, pass_through, outputs, size, batch):
    tensors = network(pass_through, 64, outputs, size, batch, dtype)
    threads(1)
    assert_like_the_formula(tensors)  # now: in 64 threads PyTorch 2.4's own float64 convolution is wrong
    alone = step_network_forward(*tensors)
    for count in (1, 2, 3, 7, 64):
        threads(count)
        assert torch.equal(step_network_forward(*tensors), alone), count


@dtypes
@pytest.mark.parametrize("hidden", [64, 33])
def test_nan_stays_where_it_is(instruction_set, dtype, hidden):
    """A NaN reaches the pixels around it, infinity is no NaN, and neither is left behind in a buffer for the next call."""
    tensors = network(6, hidden, 12, (11, 12), dtype=dtype)
    z1, pre, *_ = tensors
    expected = step_network_forward(*tensors)
    broken = [z1.clone(), *tensors[1:]]
    broken[0][0, 2, 4, 5] = float("nan")
    missing = torch.zeros(2, 12, 11, 12, dtype=torch.bool)
    missing[0, :, 2:7, 3:8] = True
    value = step_network_forward(*broken)
    assert torch.equal(value.isnan(), missing)
    assert torch.equal(value[~missing], expected[~missing])
    infinite = [z1, pre.clone(), *tensors[2:]]
    infinite[1][1, :, 4, 5] = float("inf")
    assert torch.equal(step_network_forward(*infinite).isnan(), formula(*infinite).isnan())
    assert torch.equal(step_network_forward(*tensors), expected)


@pytest.mark.slow
def test_nothing_is_read_beyond_a_tensor(tmp_path):
    """Every tensor ends where the memory does, in a process of its own: it would not survive."""
    code = """
import ctypes, math, mmap, torch
from ncsr_fast import _native
from ncsr_fast.ops.native import step_network_forward
libc, memories = ctypes.CDLL(None, use_errno=True), []
def at_the_end(*shape, channels_last=False):
    size = 4 * math.prod(shape)
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    memories.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.float32, count=size // 4, offset=pages - size).normal_()
    batch, channels, *rest = shape if channels_last else (0, 0)
    return flat.view(batch, *rest, channels).permute(0, 3, 1, 2) if channels_last else flat.view(shape)
for instruction_set in _native.instruction_sets():
    _native.use_instruction_set(instruction_set)
    for pass_through, hidden, outputs in ((6, 32, 12), (3, 33, 7), (2, 1, 1)):
        weights = [at_the_end(hidden, pass_through, 3, 3), at_the_end(hidden, hidden, 1, 1), at_the_end(hidden)]
        weights += [at_the_end(outputs, hidden, 3, 3), at_the_end(outputs)]
        for last in (False, True):
            images = at_the_end(2, pass_through, 5, 7, channels_last=last), at_the_end(2, hidden, 5, 7, channels_last=last)
            assert step_network_forward(*images, *weights).isfinite().all()
print("survived")
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("protects pages by libc")
    assert fresh_process(code, tmp_path) == "survived"
