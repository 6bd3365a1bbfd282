"""Functions that the kernels share: addressing of images with any strides, and the launch.

A kernel takes an image (B, C, H, W) as a tuple of its pointer and strides. A program works on a tile of pixels × channels
of one sample. Lanes run along the channels if the compiler sees that channels are adjacent, that is if their stride is 1.
Otherwise lanes run along the pixels, which the compiler assumes to be adjacent because they are axis 0.

A lane reads 16 bytes at once if the compiler sees that every run of 16 bytes is aligned and wholly inside or outside the image.
So numbers of channels are constants of the compiled kernel, and so are the strides of a channels-last image whose
pixels follow one another, slices of the channels included. Nothing else of such an image depends on its size: images of
all sizes run the same compiled kernel. Other images have strides that Triton specialises, on 1 and on multiples of 16.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.layout import in_memory, is_channels_last
from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.tuning import tiles

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # the first version whose kernels take tuples
    raise ImportError(f"ncsr_fast.kernels needs Triton 3.3 or newer, not {triton.__version__}")

# CUDA's errors of kernels that already ran, after which nothing runs in the process
_OF_EARLIER_KERNELS = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
SUMMED = 2048  # partial sums that a program of the second stage of a reduction adds at once, 16 a thread


@triton.jit
def program(n_pixel_tiles, n_channel_tiles):
    """Sample, tile of its pixels and tile of its channels of this program; channels vary fastest, to share a cache."""
    i = tl.program_id(0).to(tl.int64)
    return i // n_channel_tiles // n_pixel_tiles, i // n_channel_tiles % n_pixel_tiles, i % n_channel_tiles


@triton.jit
def pixel_tile(i_b, i_p, pixels, width, UNIT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Tile i_p of the pixels of a sample: (sample, rows, columns, mask, pixels of the sample, and of the batch), int64.

    All but the sample along axis 0. UNIT divides `pixels`, which tells the compiler so.
    """
    o_p = (i_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
    return i_b, o_p // width, o_p % width, o_p < pixels // UNIT * UNIT, o_p, i_b * pixels + o_p


@triton.jit
def channel_tile(i_c, BLOCK_C: tl.constexpr):
    """The channels of tile i_c, int64, along axis 1."""
    return (i_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]


@triton.jit
def at(image, pixel, o_c):
    """Pointers to channels o_c of the pixels; an index is int64, and so its product with a stride."""
    if len(image) == 2:  # channels-last, and the batch one row of pixels
        return image[0] + pixel[5] * image[1] + o_c
    elif len(image) == 4:  # no division, and the compiler knows that the pixels are adjacent
        return image[0] + pixel[0] * image[1] + o_c * image[2] + pixel[4] * image[3]
    else:
        return image[0] + pixel[0] * image[1] + o_c * image[2] + pixel[1] * image[3] + pixel[2] * image[4]


@triton.jit
def from_channel(image, o_c):
    """The image without its first o_c channels."""
    if len(image) == 2:
        return image[0] + o_c, image[1]
    elif len(image) == 4:
        return image[0] + o_c * image[2], image[1], image[2], image[3]
    else:
        return image[0] + o_c * image[2], image[1], image[2], image[3], image[4]


@triton.jit
def load(image, pixel, o_c, m_c):
    return tl.load(at(image, pixel, o_c), mask=pixel[3] & m_c, other=0.0).to(tl.float32)


@triton.jit
def store(image, pixel, o_c, b, m_c):
    tl.store(at(image, pixel, o_c), b.to(image[0].dtype.element_ty), mask=pixel[3] & m_c)


@triton.jit(do_not_specialize=["parts", "first", "outputs"])
def sum_partials_kernel(
    p_partial,  # (parts, outputs), or (outputs, parts) with PARTS_ADJACENT
    p_first,  # (first,)
    p_rest,  # (outputs - first,) or None
    parts,
    first,
    outputs,
    PARTS_ADJACENT: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The sums of the outputs over the parts, in float64; always in the same order, so the same inputs give the same bits."""
    o = (tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    b_sum = tl.zeros([BLOCK_OUTPUTS, BLOCK_PARTS], tl.float64)
    for i_part in range(0, parts, BLOCK_PARTS):
        o_part = (i_part + tl.arange(0, BLOCK_PARTS)).to(tl.int64)[None, :]
        o_partial = o[:, None] * parts + o_part if PARTS_ADJACENT else o_part * outputs + o[:, None]
        b_sum += tl.load(p_partial + o_partial, mask=(o[:, None] < outputs) & (o_part < parts), other=0.0).to(tl.float64)
    b = tl.sum(b_sum, axis=1).to(tl.float32)
    tl.store(p_first + o, b, mask=o < first)
    if p_rest is not None:
        tl.store(p_rest + o - first, b, mask=(o >= first) & (o < outputs))


def image(x: Tensor | None) -> tuple | None:
    """The form in which a kernel takes an image: its pointer and its strides, in elements.

    All four strides are passed, with two exceptions. If rows follow one another, the stride of rows is left out, and the image
    is one row of H·W columns. If also channels are adjacent and samples follow one another, only the stride of columns is
    passed, and the batch is one row of B·H·W columns. None cannot replace a stride, because Triton 3.6 does not support it.
    """
    if x is None:
        return None
    x = in_memory(x)
    batch, channel, row, column = x.stride()
    _, _, height, width = x.shape
    if row != width * column:
        return x, batch, channel, row, column
    if not is_channels_last(x) or batch != height * row:
        return x, batch, channel, column
    return x, tl.constexpr(column)


def matrix(x: Tensor) -> tuple:
    """The form in which a kernel takes a square matrix: its pointer and its strides, in elements."""
    x = in_memory(x)
    strides = x.stride()
    dense = sorted(strides) == [1, x.shape[0]]
    return x, *(tl.constexpr(stride) if dense else stride for stride in strides)


def per_sample(x: Tensor) -> tuple:
    """The form in which a kernel takes a number a sample: its pointer and its stride, in elements."""
    x = in_memory(x)
    return x, x.stride(0)


def dense(x: Tensor) -> Tensor:
    """The form in which a kernel takes a tensor that it reads from the first element to the last."""
    return in_memory(x).contiguous()


def extent(*images: Tensor | None) -> dict[str, int | bool]:
    """The sizes that a kernel over these images counts in, and their layout; the first image decides it.

    UNIT: a divisor of the pixels of a sample, more than 1 where lanes run along the pixels of an image
    """
    present = [x for x in images if x is not None]
    _, channels, height, width = present[0].shape
    along_pixels = height * width % 16 == 0 and not all(is_channels_last(x) for x in present)
    return {
        "channels": channels,
        "pixels": height * width,
        "width": width,
        "CHANNELS_LAST": is_channels_last(present[0]),
        "UNIT": 16 if along_pixels else 1,
    }


def tuned(device: torch.device, kernel: str, channels: int, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of a kernel's tiles, replaced by those in this GPU's tables for this number of channels."""
    return {**sizes, **tiles(kernel, channels)} if device.type == "cuda" else sizes


def arithmetic(x: Tensor, tf32: bool) -> str:
    """The arithmetic of products of tensors like x: "half" (float16 or bfloat16), "tf32" or "ieee"."""
    return "half" if x.dtype != torch.float32 else "tf32" if tf32 else "ieee"


def check_dtype(x: Tensor, name: str = "x") -> None:
    if x.dtype == torch.float64:
        raise TypeError(
            f"{name} must be float32, float16 or bfloat16: the Triton kernels compute in float32, not torch.float64"
        )


class KernelFailure(Exception):
    """A kernel did not compile or did not start; it has the kernel's name, and the first line of the cause."""

    def __init__(self, kernel: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        super().__init__(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
        self.kernel = kernel


launched = [0]  # kernels that were started


def launch(kernel, programs: int, device: torch.device, **arguments) -> None:
    """Start the programs on the device of the tensors and its current stream; the interpreter runs them on a CPU.

    The first launch of a kernel compiles it, or reads what an earlier process compiled from the folder that Triton's variable
    TRITON_CACHE_DIR names.

    Raises:
        KernelFailure: The kernel does not compile or start. Errors of arguments and of memory, and errors of earlier kernels
            that a launch reports, are raised unchanged.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](**arguments)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or any(text in str(error) for text in _OF_EARLIER_KERNELS):
            raise
        raise KernelFailure(kernel.fn.__name__, error) from error
    launched[0] += 1


def sum_partials(partial: Tensor, dim: int, first: Tensor, rest: Tensor | None = None) -> None:
    """Launch the second stage of reductions: write the sums of a dense matrix along `dim` to `first`, and on to `rest`."""
    parts, outputs = partial.shape[dim], partial.shape[1 - dim]
    block_outputs = 1 if dim == 1 else 8  # outputs that are adjacent, and then 32 bytes of them
    launch(
        sum_partials_kernel,
        triton.cdiv(outputs, block_outputs),
        partial.device,
        p_partial=partial,
        p_first=first,
        p_rest=rest,
        parts=parts,
        first=first.numel(),
        outputs=outputs,
        PARTS_ADJACENT=dim == 1,
        BLOCK_OUTPUTS=block_outputs,
        BLOCK_PARTS=SUMMED // block_outputs,
    )
