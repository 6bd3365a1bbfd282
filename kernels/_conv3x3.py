"""Functions that the kernels of a convolution share: how they address pixels and their neighbours, and read weights.

A program works on a tile of cells, the pixels of the smaller image. With upsampling ×2 a cell is 2×2 pixels of the larger one,
its phases, otherwise a pixel. What a tap reads is then equally far from every cell of a tile, so a lane computes pointers to
the cells once, and adds a number to them for each tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import launch
from ncsr_fast.layout import empty_channels_last, in_memory

COPIED = 1024  # numbers that a program of `copy_weights_kernel` copies, 8 a thread


@triton.jit
def cell_tile(i_p, height, width, BLOCK_P: tl.constexpr):
    """Rows and columns of tile i_p of the cells, int32, along axis 0, and their mask."""
    first = i_p.to(tl.int64) * BLOCK_P
    o_p = tl.arange(0, BLOCK_P)[:, None]
    column = (first % width).to(tl.int32) + o_p
    row = (first // width).to(tl.int32) + column // width
    return row, column % width, first + o_p < height.to(tl.int64) * width


@triton.jit
def pixel_of(cell, i_b, phase, height, width, SIDE: tl.constexpr):
    """The pixels of cells at a phase (row, column) in an image of SIDE×SIDE pixels a cell, as `pixel_tile` has them."""
    row = cell[0].to(tl.int64) * SIDE + phase[0]
    column = cell[1].to(tl.int64) * SIDE + phase[1]
    o_p = row * (width * SIDE) + column
    return i_b, row, column, cell[2], o_p, i_b * (height.to(tl.int64) * SIDE * SIDE * width) + o_p


@triton.jit
def distance(image, rows, columns, width):
    """Elements from a pixel to the one so many rows and columns further, in an image of this width."""
    rows, columns = tl.cast(rows, tl.int64), tl.cast(columns, tl.int64)
    if len(image) == 2:
        return (rows * width + columns) * image[1]
    elif len(image) == 4:
        return (rows * width + columns) * image[3]
    else:
        return rows * image[3] + columns * image[4]


@triton.jit
def channels_at(image, o_c):
    """Elements from a pixel's first channel to channels o_c."""
    if len(image) == 2:
        return o_c
    else:
        return tl.cast(o_c, tl.int64) * image[2]


@triton.jit
def step(i_tap, phase, READ: tl.constexpr, WRITTEN: tl.constexpr):
    """Rows and columns from a cell to the pixel of x that a tap reads for a phase of y.

    One of 9 taps, or where x has READ = 2 pixels a cell along an axis and all of them count, of 36.
    """
    row, column = i_tap % 9 // 3 - 1, i_tap % 3 - 1
    if READ == 2:
        return row + i_tap // 18, column + i_tap // 9 % 2
    elif WRITTEN == 2:  # rounded down: (-1, 0, 1, 2) → (-1, 0, 0, 1)
        return (row + phase[0] + 2) // 2 - 1, (column + phase[1] + 2) // 2 - 1
    else:
        return row, column


@triton.jit
def inside(cell, rows, columns, height, width, READ: tl.constexpr):
    """The mask of cells for which the pixel so many rows and columns further is in the image: comparisons of unsigned numbers,
    so two in place of four."""
    row, column = cell[0] * READ + rows, cell[1] * READ + columns
    m_row = row.to(tl.uint32) < (READ * height).to(tl.uint32)
    return cell[2] & m_row & (column.to(tl.uint32) < (READ * width).to(tl.uint32))


@triton.jit
def copy_weights_kernel(weights, BLOCK: tl.constexpr):
    """Copy weights to others of the order (outputs, 9, inputs), which may be of another dtype.

    weights: of each its pointer and strides of an output, an input, a row and a column, the pointer of the copy, and the
        numbers of outputs and inputs
    """
    i = tl.program_id(0)
    for i_weight in tl.static_range(len(weights)):
        p_weight, by_output, by_input, by_row, by_column, p_copy, outputs, inputs = weights[i_weight]
        blocks = tl.cdiv(9 * outputs * inputs, BLOCK)
        if (i >= 0) & (i < blocks):
            o = i * BLOCK + tl.arange(0, BLOCK)
            o_n, o_tap, o_c = (o // (9 * inputs)).to(tl.int64), (o // inputs % 9).to(tl.int64), (o % inputs).to(tl.int64)
            o_weight = o_n * by_output + o_c * by_input + o_tap // 3 * by_row + o_tap % 3 * by_column
            b = tl.load(p_weight + o_weight, mask=o < 9 * outputs * inputs)
            tl.store(p_copy + o, b.to(p_copy.dtype.element_ty), mask=o < 9 * outputs * inputs)
        i -= blocks


def in_runs(x: Tensor) -> bool:
    """True where all channels of a pixel are read or written 8 at once."""
    return x.stride(1) == 1 and x.stride(3) % 8 == x.shape[1] % 8 == 0


def conv3x3_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights (outputs, inputs, 3, 3) as the kernels read them: in this dtype, with the inputs adjacent.

    Those that are not are copied, all by one kernel.
    """
    weights = [in_memory(weight) for weight in weights]
    read = [weight if _is_readable(weight, dtype) else _like(weight, dtype) for weight in weights]
    copied = [(weight, copy) for weight, copy in zip(weights, read) if copy is not weight]
    if copied:
        launch(
            copy_weights_kernel,
            sum(triton.cdiv(weight.numel(), COPIED) for weight, _ in copied),
            weights[0].device,
            weights=tuple((weight, *weight.stride(), copy, *map(tl.constexpr, weight.shape[:2])) for weight, copy in copied),
            BLOCK=COPIED,
        )
    return read


def _is_readable(weight: Tensor, dtype: torch.dtype) -> bool:
    _, by_input, by_row, by_column = weight.stride()
    return weight.dtype == dtype and by_input == 1 and by_row == 3 * by_column


def _like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_channels_last(weight.shape, weight, dtype)
