"""conv3x3 by Winograd's algorithm and its gradients: against PyTorch's convolutions in float64."""

from __future__ import annotations

import functools
import sys

import installation
import pytest
import torch
import torch.nn.functional as F
from layouts import IMAGES, LAYOUTS
from operator_cases import WIDEST, assert_close, marked, pairwise_but_on_the_widest
from support import fresh_process
from torch import Tensor

if not installation.expects("native"):
    pytest.skip("the native backend is not among the cells", allow_module_level=True)

from ncsr_fast.ops.native import conv3x3_backward, conv3x3_forward

LAST = torch.channels_last
DTYPES, EITHER = [torch.float32, torch.float64], [False, True]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def case(inputs: int, outputs: int, size=(5, 7), batch: int = 2, dtype=torch.float64) -> list[Tensor]:
    """x, weight, bias and dy, where conv(x) is of about 1."""
    generator = torch.Generator().manual_seed(inputs + 100 * outputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = normal(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
    return [normal(batch, inputs, *size), weight, normal(outputs), normal(batch, outputs, *size)]


def input_gradient(dy: Tensor, x: Tensor, weight: Tensor, **options) -> Tensor:
    dx, *others = conv3x3_backward(dy, x, weight, (True, False, False), **options)
    assert others == [None, None]
    return dx


def weight_gradients(dy: Tensor, x: Tensor, weight: Tensor, **options) -> tuple[Tensor, Tensor]:
    dx, dweight, dbias = conv3x3_backward(dy, x, weight, (False, True, True), **options)
    assert dx is None
    return dweight, dbias


def large_tiles(rows: int, columns: int) -> bool:
    """Whether F(4x4, 3x3) has fewer products than F(2x2, 3x3)."""
    return 36 * -(-rows // 4) * -(-columns // 4) <= 16 * -(-rows // 2) * -(-columns // 2)


def forward_tolerance(dtype: torch.dtype, inputs: int, y: Tensor) -> float:
    """What the sums over so many inputs may be wrong by, beside the largest result.

    Each of n additions rounds a partial sum by half an eps at most, up or down as it comes: some ½√n eps in all, and 4 for
    the transforms. The sums at the positions are larger than the results, whose variance is that of 3·3 products: along a
    line by Σ A² |B|² |G|² over the positions, at the output where it is largest 5 in F(2x2, 3x3) and 24.5 in F(4x4, 3x3).
    float64: two results, of sums in different orders.
    """
    larger = 24.5 / 3 if large_tiles(*y.shape[2:]) else 5 / 3
    return 1e-13 if dtype == torch.float64 else (inputs**0.5 / 2 + 4) * larger * torch.finfo(dtype).eps


def weight_tolerance(dtype: torch.dtype, y: Tensor) -> float:
    """As `forward_tolerance`, for sums over tiles: m·m products are in a tile's part of the result, and along a line the sums
    at the positions add up to Σ G² |A|² |B|² of their variance, at most 4 of 2 in F(2x2, 3x3) and 26.3 of 4 in F(4x4, 3x3).
    """
    side, larger = (4, 26.3 / 4) if large_tiles(*y.shape[2:]) else (2, 4 / 2)
    tiles = len(y) * -(-y.shape[2] // side) * -(-y.shape[3] // side)
    return 1e-13 if dtype == torch.float64 else (tiles**0.5 / 2 + 4) * larger * torch.finfo(dtype).eps


def gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rest = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
    tensors = [tensor.double().contiguous() for tensor in (dy, x, weight)]
    return torch.ops.aten.convolution_backward(*tensors, [weight.shape[0]], *rest)


@functools.lru_cache(maxsize=1)
def case_by_torch(inputs: int, outputs: int, size, batch: int, dtype: torch.dtype, upsample2x: bool = False) -> list[Tensor]:
    """Those of `case`; y, dx, dw and db in float64, made once for all instruction sets.

    With upsample2x, y is the convolution of the upsampled x, dy has the size of y, and dx is the gradient of x itself.
    """
    x, weight, bias, dy = case(inputs, outputs, size, batch, dtype)
    if not upsample2x:
        y = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        return [x, weight, bias, dy, y, *gradients(dy, x, weight)]
    dy = case(outputs, 1, (2 * size[0], 2 * size[1]), batch, dtype)[0]
    y = F.conv2d(upsampled(x), weight.double(), bias.double(), padding=1)
    dx, dw, db = gradients(dy, upsampled(x), weight)
    return [x, weight, bias, dy, y, 4 * F.avg_pool2d(dx, 2), dw, db]


def assert_like_torch(inputs: int, outputs: int, size, batch: int = 2, *, dtype: torch.dtype) -> None:
    x, weight, bias, dy, y, dx, dw, db = case_by_torch(inputs, outputs, size, batch, dtype)
    value = conv3x3_forward(x, weight, bias)
    assert value.dtype == x.dtype
    assert value.is_contiguous(memory_format=LAST)
    assert_close(value, y, forward_tolerance(x.dtype, inputs, dy), "y")
    value = input_gradient(dy, x, weight)
    assert value.is_contiguous(memory_format=LAST)
    assert_close(value, dx, forward_tolerance(x.dtype, outputs, dy), "dx")
    dweight, dbias = weight_gradients(dy, x, weight)
    tolerance = weight_tolerance(x.dtype, dy)
    assert dweight.is_contiguous()
    assert_close(dweight, dw, tolerance, "dweight")
    assert_close(dbias, db, tolerance, "dbias")


@dtypes
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (2, 2), (6, 6), (9, 13), (3, 98), (20, 21), (45, 46)], ids=str)
def test_sizes(instruction_set, dtype, size):
    """Tiles of both sizes, partly outside the image, and blocks of 24 and 192 tiles, all of a height and not."""
    assert_like_torch(16, 32, size, dtype=dtype)


@dtypes
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (3, 64), (64, 3), (5, 7), (16, 33), (31, 32), (66, 130), (192, 64)])
def test_channels(instruction_set, dtype, inputs, outputs):
    """Whole vectors and panels, parts of them, and the next group of panels."""
    assert_like_torch(inputs, outputs, (4, 9), dtype=dtype)


@dtypes
@pytest.mark.parametrize(
    "inputs, outputs, size, batch",
    # the weights are too many for one thread's cache, by their outputs, by their inputs, and so are those of dx; the tiles
    # are too many for what the threads share
    [(200, 1100, (6, 8), 3), (700, 40, (5, 8), 1), (200, 1100, (41, 42), 1), (700, 24, (61, 60), 1)],
    ids=str,
)
@pytest.mark.slow
def test_pieces(instruction_set, dtype, inputs, outputs, size, batch):
    assert_like_torch(inputs, outputs, size, batch, dtype=dtype)


def memory(x: Tensor) -> Tensor:
    """All that a tensor is a part of."""
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@pairwise_but_on_the_widest(x_layout=IMAGES, out_layout=IMAGES, dtype=DTYPES, accumulate=EITHER)
@dtypes
@pytest.mark.parametrize("accumulate", EITHER)
@pytest.mark.parametrize("out_layout", IMAGES)
@pytest.mark.parametrize("x_layout", IMAGES)
def test_layouts(instruction_set, dtype, x_layout, out_layout, accumulate):
    """x is read and out written at their strides, each in a layout of its own, and no memory around them is."""
    x, weight, bias, before = case(33, 35, (5, 6), dtype=dtype)
    x, out = LAYOUTS[x_layout](x), LAYOUTS[out_layout](before.clone())
    beside = torch.full_like(memory(out), 1, dtype=torch.bool)
    torch.as_strided(beside, out.shape, out.stride(), out.storage_offset()).fill_(False)
    around = memory(out)[beside].clone()
    assert conv3x3_forward(x, weight, bias, out=out, accumulate=accumulate) is out
    expected = F.conv2d(x.double().contiguous(), weight.double(), bias.double(), padding=1) + before.double() * accumulate
    assert_close(out, expected, forward_tolerance(dtype, 33, out), "y")
    assert torch.equal(memory(out)[beside].nan_to_num(7.5), around.nan_to_num(7.5))
    dy = LAYOUTS[out_layout](before)
    _, dw, db = gradients(dy, x, weight)
    for value, expected in zip(weight_gradients(dy, x, weight), (dw, db)):
        assert_close(value, expected, weight_tolerance(dtype, dy), "weight gradient")


@dtypes
@pytest.mark.parametrize("inputs, outputs, channels", [(64, 32, 192), (160, 32, 192), (5, 7, 23), (70, 260, 340)])
def test_out_beside_x(instruction_set, dtype, inputs, outputs, channels):
    """The next channels of the same tensor, as in a dense block, and its gradient added to the channels before."""
    _, weight, bias, _ = case(inputs, outputs, dtype=dtype)
    before = case(channels, 1, (7, 8), dtype=dtype)[0].to(memory_format=LAST)
    together = before.clone()
    x, out = together[:, :inputs], together[:, inputs : inputs + outputs]
    conv3x3_forward(x, weight, bias, slope=0.2, out=out)
    expected = F.leaky_relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1), 0.2)
    assert_close(out, expected, forward_tolerance(dtype, inputs, out), "y")
    assert torch.equal(x, before[:, :inputs])
    assert torch.equal(together[:, inputs + outputs :], before[:, inputs + outputs :])
    together.copy_(before)
    assert input_gradient(out, x, weight, dx=x) is x
    expected = before[:, :inputs].double() + F.conv_transpose2d(out.double(), weight.double(), padding=1)
    assert_close(x, expected, forward_tolerance(dtype, outputs, out), "dx")
    assert torch.equal(together[:, inputs:], before[:, inputs:])


@pairwise_but_on_the_widest(inputs=[16, 5, 400], slope=[0.0, 0.2, 1.0], with_bias=EITHER, accumulate=EITHER, dtype=DTYPES)
@dtypes
@pytest.mark.parametrize("inputs, outputs", [(16, 32), (5, 7), (400, 40)])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("with_bias", EITHER)
@pytest.mark.parametrize("accumulate", EITHER)
def test_what_follows_the_sums(instruction_set, dtype, inputs, outputs, slope, with_bias, accumulate):
    x, weight, bias, before = case(inputs, outputs, dtype=dtype)
    out = before.contiguous(memory_format=LAST)
    conv3x3_forward(x, weight, bias if with_bias else None, slope=slope, out=out, accumulate=accumulate)
    sums = F.conv2d(x.double(), weight.double(), bias.double() * with_bias, padding=1)
    assert_close(out, F.leaky_relu(sums, slope) + before.double() * accumulate, forward_tolerance(dtype, inputs, out), "y")


@pairwise_but_on_the_widest(relu_channels=[32, 64, 2, 53, 17], relu_layout=IMAGES, accumulate=EITHER, dtype=DTYPES)
@dtypes
@pytest.mark.parametrize(
    "inputs, outputs, relu_channels", [(96, 32, 32), (64, 32, 64), (5, 7, 2), (33, 40, 32), (70, 40, 53), (40, 700, 17)]
)
@pytest.mark.parametrize("relu_layout", IMAGES)
@pytest.mark.parametrize("accumulate", EITHER)
def test_a_gradient_through_a_leaky_relu(instruction_set, dtype, inputs, outputs, relu_channels, relu_layout, accumulate):
    """The output of a leaky ReLU as the last channels of x: whole vectors of channels, and some that begin within one."""
    _, weight, _, dy = case(inputs, outputs, dtype=dtype)
    before, relu_output = case(inputs, 1, dtype=dtype)[0], LAYOUTS[relu_layout](case(relu_channels, 1, dtype=dtype)[0])
    dx = before.contiguous(memory_format=LAST) if accumulate else None
    dx = input_gradient(dy, before, weight, relu=(relu_output, 0.2), dx=dx)
    expected = F.conv_transpose2d(dy.double(), weight.double(), padding=1) + before.double() * accumulate
    last = expected[:, -relu_channels:]
    last.copy_(torch.where(relu_output > 0, last, 0.2 * last))
    assert_close(dx, expected, forward_tolerance(dtype, outputs, dx), "dx")


def upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x.double().contiguous(), scale_factor=2, mode="nearest")


@dtypes
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (8, 5), (31, 30)], ids=str)
@pytest.mark.parametrize("inputs, outputs", [(16, 32), (5, 7), (70, 130), (200, 1100), (700, 40)])
@marked("slow", lambda inputs: inputs > 16)
@marked(
    "exhaustive",
    lambda inputs, size, dtype, instruction_set: (
        inputs > 100 and size == (31, 30) and (instruction_set != WIDEST or dtype == torch.float64)
    ),
)
def test_upsample2x(instruction_set, dtype, size, inputs, outputs):
    """The convolution of an input read upsampled and its gradients, as those of the upsampled image."""
    x, weight, bias, dy, y, dx, dw, db = case_by_torch(inputs, outputs, size, 2, dtype, upsample2x=True)
    assert_close(conv3x3_forward(x, weight, bias, upsample2x=True), y, forward_tolerance(dtype, inputs, dy), "y")
    value = input_gradient(dy, x, weight, upsample2x=True)
    assert_close(value, dx, forward_tolerance(dtype, outputs, dy), "dx")
    dweight, dbias = weight_gradients(dy, x, weight, upsample2x=True)
    assert_close(dweight, dw, weight_tolerance(dtype, dy), "dweight")
    assert_close(dbias, db, weight_tolerance(dtype, dy), "dbias")


@pairwise_but_on_the_widest(x_layout=IMAGES, out_layout=IMAGES, dtype=DTYPES, accumulate=EITHER)
@dtypes
@pytest.mark.parametrize("accumulate", EITHER)
@pytest.mark.parametrize("x_layout", IMAGES)
@pytest.mark.parametrize("out_layout", IMAGES)
def test_layouts_with_upsample2x(instruction_set, dtype, x_layout, out_layout, accumulate):
    x, weight, _, _ = case(33, 35, (5, 6), dtype=dtype)
    x, before = LAYOUTS[x_layout](x), case(35, 1, (10, 12), dtype=dtype)[0]
    out = LAYOUTS[out_layout](before.clone())
    conv3x3_forward(x, weight, None, upsample2x=True, out=out, accumulate=accumulate)
    expected = F.conv2d(upsampled(x), weight.double(), padding=1) + before.double() * accumulate
    assert_close(out, expected, forward_tolerance(dtype, 33, out), "y")
    dx, dw, _ = gradients(before, upsampled(x), weight)
    dy, start = LAYOUTS[out_layout](before), x.double().clone()
    assert_close(weight_gradients(dy, x, weight, upsample2x=True)[0], dw, weight_tolerance(dtype, dy), "dweight")
    value = input_gradient(dy, x, weight, upsample2x=True, dx=x if accumulate else None)
    expected = 4 * F.avg_pool2d(dx, 2) + start * accumulate
    assert_close(value, expected, forward_tolerance(dtype, 35, dy), "dx")


@dtypes
@pytest.mark.parametrize("upsample2x", EITHER)
def test_some_inputs_of_a_weight(instruction_set, dtype, upsample2x):
    """They are read and written in place, and the inputs beside them are not written."""
    x, _, bias, dy = case(21, 19, (6, 8), dtype=dtype)
    dy = case(19, 1, (12, 16), dtype=dtype)[0] if upsample2x else dy
    weight = case(50, 19, dtype=dtype)[1]
    some, alone = weight[:, 17:38], weight[:, 17:38].contiguous()
    found, expected = (conv3x3_forward(x, w, bias, upsample2x=upsample2x) for w in (some, alone))
    assert torch.equal(found, expected)
    found, expected = (input_gradient(dy, x, w, upsample2x=upsample2x) for w in (some, alone))
    assert torch.equal(found, expected)
    dweight = weight.clone()
    weight_gradients(dy, x, some, upsample2x=upsample2x, dweight=dweight[:, 17:38])
    assert torch.equal(dweight[:, 17:38], weight_gradients(dy, x, some, upsample2x=upsample2x)[0])
    assert torch.equal(dweight[:, :17], weight[:, :17])
    assert torch.equal(dweight[:, 38:], weight[:, 38:])


@dtypes
def test_accumulation_without_out_starts_at_zero(dtype):
    x, weight, bias, _ = case(5, 7, dtype=dtype)
    assert torch.equal(conv3x3_forward(x, weight, bias, accumulate=True), conv3x3_forward(x, weight, bias))


@dtypes
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty(instruction_set, dtype, shape):
    batch, *size = shape
    x, weight, bias, dy = case(5, 7, size, batch, dtype)
    assert conv3x3_forward(x, weight, bias).shape == (batch, 7, *size)
    assert input_gradient(dy, x, weight).shape == (batch, 5, *size)
    before = case(5, 7, dtype=dtype)
    weight_gradients(before[3], before[0], weight)  # leaves sums behind
    dweight, dbias = weight_gradients(dy, x, weight)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@dtypes
@pytest.mark.parametrize(
    "inputs, outputs, size, batch", [(64, 32, (20, 20), 1), (5, 7, (17, 9), 3), (200, 1100, (10, 10), 2), (700, 40, (9, 9), 1)]
)
@marked("slow", lambda inputs: inputs > 100)
@marked(
    "exhaustive", lambda inputs, dtype, instruction_set: inputs > 100 and dtype == torch.float64 and instruction_set != WIDEST
)
def test_the_same_bits_whatever_the_number_of_threads(instruction_set, threads, dtype, inputs, outputs, size, batch):
    x, weight, bias, dy = (t.to(memory_format=LAST) if t.dim() == 4 else t for t in case(inputs, outputs, size, batch, dtype))
    weight = weight.contiguous()

    twice = torch.cat([torch.cat([dy, dy], dim=2)] * 2, dim=3).to(memory_format=LAST)

    def results() -> list[Tensor]:
        found = [conv3x3_forward(x, weight, bias, slope=0.2), *conv3x3_backward(dy, x, weight, (True, True, True))]
        found += [conv3x3_forward(x, weight, bias, upsample2x=True)]
        return [*found, *conv3x3_backward(twice, x, weight, (True, True, True), upsample2x=True)]

    threads(1)
    alone = results()
    for count in (1, 2, 3, 7, 64):
        threads(count)
        assert all(map(torch.equal, results(), alone)), count


@dtypes
@pytest.mark.parametrize("inputs, outputs", [(16, 32), (200, 1100), (700, 40)])
@marked("slow", lambda inputs: inputs > 100)
def test_nan_stays_in_its_tiles(instruction_set, dtype, inputs, outputs):
    """Those of 4x4 outputs whose 6x6 inputs hold it; none is left behind in a buffer for the next call."""
    x, weight, bias, dy = case(inputs, outputs, (11, 12), dtype=dtype)
    expected, gradient = conv3x3_forward(x, weight, bias), weight_gradients(dy, x, weight)
    broken = x.clone()
    broken[0, 2, 4, 5] = float("nan")
    reached = torch.zeros(2, outputs, 11, 12, dtype=torch.bool)
    reached[0, :, :8, 4:8] = True
    value = conv3x3_forward(broken, weight, bias)
    assert value[0, :, 3:6, 4:7].isnan().all()
    assert torch.equal(value[~reached], expected[~reached])
    assert weight_gradients(dy, broken, weight)[0].isnan().any()
    assert torch.equal(conv3x3_forward(x, weight, bias), expected)
    assert all(map(torch.equal, weight_gradients(dy, x, weight), gradient))


@pytest.mark.slow
def test_nothing_is_read_or_written_beyond_a_tensor(tmp_path):
    """Every tensor begins or ends where the memory does, in a process of its own: it would not survive."""
    code = """
import ctypes, math, mmap, torch
from ncsr_fast import _native
from ncsr_fast.ops.native import conv3x3_backward, conv3x3_forward
libc, memories, page = ctypes.CDLL(None, use_errno=True), [], mmap.PAGESIZE
def at_the_edge(end, *shape, last=False):
    size = 4 * math.prod(shape)
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    memories.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = page + pages - size if end else page
    flat = torch.frombuffer(memory, dtype=torch.float32, count=size // 4, offset=offset).normal_()
    for edge in (start, start + page + pages):
        assert libc.mprotect(ctypes.c_void_p(edge), page, 0) == 0
    batch, channels, *rest = shape if last else (0, 0)
    return flat.view(batch, *rest, channels).permute(0, 3, 1, 2) if last else flat.view(shape)
for instruction_set in _native.instruction_sets():
    _native.use_instruction_set(instruction_set)
    for inputs, outputs in ((16, 32), (3, 33), (2, 1), (200, 1100), (700, 40)):
        for end in (False, True):
            weight, bias = at_the_edge(end, outputs, inputs, 3, 3), at_the_edge(end, outputs)
            for last in (False, True):
                x, y, dx = (at_the_edge(end, 2, n, 5, 7, last=last) for n in (inputs, outputs, inputs))
                for upsample2x in (False, True):
                    y = at_the_edge(end, 2, outputs, 10, 14, last=last) if upsample2x else y
                    assert conv3x3_forward(x, weight, bias, upsample2x=upsample2x, out=y).isfinite().all()
                    gradients = conv3x3_backward(y, x, weight, (True, True, True), upsample2x=upsample2x, dx=dx)
                    assert all(value.isfinite().all() for value in gradients)
print("survived")
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("protects pages by libc")
    assert fresh_process(code, tmp_path) == "survived"
