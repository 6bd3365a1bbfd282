"""Inverse and log|det| of square matrices in float64: one program per matrix, Gauss-Jordan with partial pivoting.

A step of the elimination reads one half of the program's workspace and writes the other, so that one barrier per step is
enough. The two swapped rows are not moved: row k of the result comes from the pivot's row, and the pivot's from
row k. With P the product of the swaps, what remains is (P·W)⁻¹, and W⁻¹ = (P·W)⁻¹·P: its columns are permuted at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import dense, launch, tuned

_ROWS = 16  # of a tile, of which a thread has 8 elements, or 16 of the largest


@triton.jit
def inverse_logdet_kernel(
    weight,  # (N, C, C)
    workspace,  # (N, 2, C, C)
    inverse,  # (N, C, C)
    logdet,  # (N,)
    condition,  # (N,)
    channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    elements = channels * channels
    weight += i * elements
    workspace += 2 * i * elements
    inverse += i * elements
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < channels
    o_tile = tl.arange(0, ROWS)
    b_norm = tl.zeros((ROWS,), tl.float64)
    b_total = tl.zeros((ROWS,), tl.float64)
    for r in range(0, channels, ROWS):
        o_r = r + o_tile
        o, mask = o_r[:, None] * channels + o_c[None, :], (o_r < channels)[:, None] & m_c[None, :]
        b = tl.load(weight + o, mask=mask, other=0.0)
        tl.store(workspace + o, b, mask=mask)
        b_sum = tl.sum(tl.abs(b), axis=1)
        b_norm = tl.maximum(b_norm, b_sum)
        b_total += b_sum
    norm = tl.max(b_norm, axis=0) + 0.0 * tl.sum(b_total, axis=0)  # a maximum may ignore NaN, a sum does not
    b_columns = o_c  # for each column of the result, its column of the inverse
    b_logdet = norm * 0.0
    tl.debug_barrier()
    for k in range(channels):
        source = workspace + (k % 2) * elements
        target = workspace + (1 - k % 2) * elements
        b_magnitude = tl.abs(tl.load(source + o_c * channels + k, mask=m_c, other=0.0))
        b_magnitude = tl.where(b_magnitude >= 0, b_magnitude, -1.0)  # NaN cannot be a pivot
        pivot = tl.argmax(tl.where((o_c >= k) & m_c, b_magnitude, -2.0), axis=0)
        value = tl.load(source + pivot * channels + k)
        b_row = tl.load(source + pivot * channels + o_c, mask=m_c, other=0.0)
        b_row = tl.where(o_c == k, 1.0, b_row) * (1.0 / value)
        b_logdet = tl.where(b_logdet == float("-inf"), b_logdet, b_logdet + tl.log(tl.abs(value)))  # singular: after it NaN
        for r in range(0, channels, ROWS):
            o_r = r + o_tile
            o, mask = o_r[:, None] * channels + o_c[None, :], (o_r < channels)[:, None] & m_c[None, :]
            o_from = tl.where(o_r == pivot, k, o_r)
            b_factor = tl.load(source + o_from * channels + k, mask=o_r < channels, other=0.0)
            b = tl.load(source + o_from[:, None] * channels + o_c[None, :], mask=mask, other=0.0)
            b = tl.where((o_c == k)[None, :], 0.0, b) - b_factor[:, None] * b_row[None, :]
            tl.store(target + o, tl.where((o_r == k)[:, None], b_row[None, :], b), mask=mask)
        column_k = tl.sum(tl.where(o_c == k, b_columns, 0), axis=0)
        column_pivot = tl.sum(tl.where(o_c == pivot, b_columns, 0), axis=0)
        b_columns = tl.where(o_c == k, column_pivot, tl.where(o_c == pivot, column_k, b_columns))
        tl.debug_barrier()
    b_norm = tl.zeros((ROWS,), tl.float64)
    b_total = tl.zeros((ROWS,), tl.float64)
    for r in range(0, channels, ROWS):
        o_r = r + o_tile
        o, mask = o_r[:, None] * channels + o_c[None, :], (o_r < channels)[:, None] & m_c[None, :]
        b = tl.load(workspace + (channels % 2) * elements + o, mask=mask, other=0.0)
        tl.store(inverse + o_r[:, None] * channels + b_columns[None, :], b, mask=mask)
        b_sum = tl.sum(tl.abs(b), axis=1)
        b_norm = tl.maximum(b_norm, b_sum)
        b_total += b_sum
    tl.store(logdet + i, b_logdet)
    tl.store(condition + i, norm * (tl.max(b_norm, axis=0) + 0.0 * tl.sum(b_total, axis=0)))


def inverse_logdet(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W⁻¹ (N, C, C), log|det W| (N,) and the condition number ‖W‖·‖W⁻¹‖ (N,) in the ∞-norm of float64 W (N, C, C)."""
    count, channels, _ = weight.shape
    inverse = weight.new_empty(weight.shape)
    logdet, condition = weight.new_empty(2, count).unbind()
    if count:
        block = triton.next_power_of_2(channels)
        options = {"num_warps": min(8, max(1, block * _ROWS // 256))}
        launch(
            inverse_logdet_kernel,
            count,
            weight.device,
            weight=dense(weight),
            workspace=weight.new_empty(count, 2, channels, channels),
            inverse=inverse,
            logdet=logdet,
            condition=condition,
            channels=channels,
            BLOCK=block,
            ROWS=_ROWS,
            **tuned(weight.device, "inverse_logdet", channels, options),
        )
    return inverse, logdet, condition
