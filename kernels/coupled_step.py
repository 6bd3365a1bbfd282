"""A coupling with its network, and the maps of single pixels behind it up to the next network, in one kernel or two.

    h2         = relu(w2 · relu(w1 ∗ z1 + pre) + b2)           `store_hidden`
    (t, r)     = w3 ∗ h2 + b3,  s = sigmoid(r + 2) + eps       a program has the shifts and the raw scales as two sums
    z2        ← (z2 + t) · s, or z2 / s - t for the inverse
    y          = a(mix · z + offset), or mix · a⁻¹(z) + offset for the inverse

a is an injector, an affine map of all channels whose network reads the condition alone, so that its outputs are known; it and
the mix may be left out. Shift, raw scale and all that follows are float32 and never rounded, but where a caller wants (t, r):
those are in memory as the network's output, in its dtype.

With the first layers in the kernel, a program computes h2 of a region with a border of a pixel, writes it to memory of its own,
waits until all of its threads have, and reads it nine times from there. There are as many programs as a GPU has room for, each
with region after region, so that the memory of them all stays in the L2 cache: h2 is not in the GPU's memory at all, which is
two thirds of the bytes of a step. Without, h2 is an argument, a program has a tile, and `hidden` ran before: for images of few
regions. Both compute a pixel by the same operations in the same order.

The mix is true float32, by the reason of `flow_step`; above MIXED channels its tile leaves the network's no registers, and the
kernel of `flow_step` follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, channel_tile, check_dtype, dense, image, launch, load, matrix, store
from ncsr_fast.kernels._elementwise import load_pair
from ncsr_fast.kernels._step_network import (
    COLUMNS,
    HIDDEN,
    HIDDEN_READ,
    INPUTS,
    Packed,
    add_bias,
    add_convolved,
    block,
    pixels_at,
    rectangle,
    store_hidden,
    tiling,
)
from ncsr_fast.kernels.affine import affine_map
from ncsr_fast.kernels.flow_step import flow_step_parts, largest, load_matrix
from ncsr_fast.kernels.step_network import launch_hidden, packed_network
from ncsr_fast.layout import empty_channels_last, empty_like

# Chosen for registers and spills by the ahead-of-time report (ncsr_fast.kernels.ahead_of_time), never timed: no GPU yet.
MIXED = 24  # channels of a state, at most, whose mix is in the kernel
REGION = (16, 32)  # rows and columns: a fifth more pixels of h2 than of the region, and 80 KB of them
PROGRAMS = 264  # at once, two of each of 132 multiprocessors: 21 MB of h2, of 50 MB of L2 cache
# Unless told how many registers a thread may have, ptxas spills a few bytes to fit another program; and of several stages of
# the loops over a region Triton keeps 230 KB in shared memory. By the block of the channels, 16, 32 or more: sums of a pixel
# at least, so that a tile has 128 or 64 pixels in half precision, and registers of a thread. With 168 those of 96 channels
# spill on sm_90, where they take 208.
SUMS = {16: 64, 32: 128, 64: 128}
REGISTERS = {16: 255, 32: 168, 64: 255}
MOST_SUMS = 128  # of a pixel, by 4 warps in half precision; of more by 8, for 32 pixels are too few for sm_90's products
INSIDE = {"num_stages": 1}
ROUNDS = 2  # of regions, at least, where the first layers are in the kernel: of fewer the last one leaves half a GPU idle


@triton.jit
def injected(b, h, pixel, first: tl.constexpr, count: tl.constexpr, eps, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The injector on `count` channels from `first` on, and its log-det terms; b itself and zeros without one."""
    if h is None:
        return b, tl.zeros_like(b)
    else:
        b_shift, b_raw = load_pair(h, pixel, 0, -first, count, BLOCK, True)
        b_y, b_logdet = affine_map(b, b_shift, b_raw, eps, INVERSE)
        return b_y, tl.where(pixel[3] & (channel_tile(0, BLOCK) < count), b_logdet, 0.0)


@triton.jit
def finish_tile(
    z,
    h2,
    p_w3,
    p_b3,
    mix,
    p_offset,
    injector,
    y,
    h,
    pixel,
    stored,  # the same pixels in the memory of h2
    pitch,  # of that memory
    height,
    width,
    eps,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    TILE: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    READ: tl.constexpr,
    READS: tl.constexpr,
):
    """Store y, and (t, r) where they are wanted, of a tile of pixels: its share of the log-det, and the largest magnitude of a
    mixed y."""
    PAIRS: tl.constexpr = OUTS // 2
    changed: tl.constexpr = channels - pass_through
    o_n, o_c = channel_tile(0, PAIRS), channel_tile(0, BLOCK_C)
    m_1, m_2 = o_n < pass_through, o_n < changed
    b_zero = tl.zeros([TILE, PAIRS], tl.float32)
    b_shift, b_raw = add_convolved(
        b_zero, b_zero, h2, p_w3, stored, o_n, height, width, hidden, OUTS, READ, READS, PRECISION, UNROLLED, pitch
    )
    b_shift, b_raw = add_bias(b_shift, p_b3, 2 * o_n, m_2), add_bias(b_raw, p_b3, 2 * o_n + 1, m_2)
    if h is not None:
        o_h = channel_tile(0, OUTS)
        store(h, pixel, o_h, tl.interleave(b_shift, b_raw), o_h < 2 * changed)
    b_z, b_terms = affine_map(load(z, pixel, o_n + pass_through, m_2), b_shift, b_raw, eps, INVERSE)
    b_z, logdet = tl.where(m_2, b_z, 0.0), tl.sum(tl.where(pixel[3] & m_2, b_terms, 0.0))
    if mix is None:
        store(y, pixel, o_n, load(z, pixel, o_n, m_1), m_1)
        store(y, pixel, o_n + pass_through, b_z, m_2)
        return logdet, 0.0
    else:  # one half of the channels after the other: both at once would not leave enough registers
        if INVERSE:
            b_z, b_terms = injected(b_z, injector, pixel, pass_through, changed, eps, INVERSE, PAIRS)
            logdet += tl.sum(b_terms)
        b_mix = load_matrix(mix, o_c, tl.trans(o_n) + pass_through, channels)
        b_w = tl.dot(tl.where(m_2, b_z, 0.0), b_mix, input_precision="ieee")
        b_z = load(z, pixel, o_n, m_1)
        if INVERSE:
            b_z, b_terms = injected(b_z, injector, pixel, 0, pass_through, eps, INVERSE, PAIRS)
            logdet += tl.sum(b_terms)
        b_mix = load_matrix(mix, o_c, tl.trans(o_n), channels)
        b_w = tl.dot(tl.where(m_1, b_z, 0.0), b_mix, b_w, input_precision="ieee")
        b_w = add_bias(b_w, p_offset, o_c, o_c < channels)
        if not INVERSE:
            b_w, b_terms = injected(b_w, injector, pixel, 0, channels, eps, INVERSE, BLOCK_C)
            logdet += tl.sum(b_terms)
        store(y, pixel, o_c, b_w, o_c < channels)
        return logdet, largest(tl.where(pixel[3] & (o_c < channels), b_w, 0.0))


@triton.jit(do_not_specialize=["batch", "height", "width"])
def coupled_step_kernel(
    z,  # (B, C, H, W)
    pre,  # (B, hidden, H, W), or None: h2 is given
    p_w1,  # packed, as w2 and w3
    p_w2,
    p_b2,  # (hidden,)
    h2,  # (B, hidden, H, W), or (programs, hidden, rows, columns) of a region with its border
    p_w3,
    p_b3,  # (2(C - pass_through),)
    mix,  # (C, C) or None
    p_offset,  # (C,) or None
    injector,  # (B, 2C, H, W) or None
    y,  # (B, C, H, W)
    h,  # (B, 2(C - pass_through), H, W) or None
    p_logdet,  # (B, tiles)
    p_peak,  # likewise, or None
    batch,
    height,
    width,
    eps,
    pass_through: tl.constexpr,
    channels: tl.constexpr,
    hidden: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    UNROLLED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS_K: tl.constexpr,
    READ: tl.constexpr,
    READS: tl.constexpr,
):
    """A tile of ROWS × COLUMNS pixels; or with so many programs, regions of DOWN × ACROSS tiles. Samples are neighbours."""
    TILE: tl.constexpr = ROWS * COLUMNS
    n_down, n_across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    first = tl.program_id(0).to(tl.int64)
    if PROGRAMS == 0:
        pixel = rectangle(first % batch, first // batch, height, width, ROWS, COLUMNS)
        logdet, peak = finish_tile(
            z, h2, p_w3, p_b3, mix, p_offset, injector, y, h, pixel, pixel, width, height, width, eps, pass_through,
            channels, hidden, INVERSE, PRECISION, UNROLLED, TILE, OUTS, BLOCK_C, READ, READS,
        )  # fmt: skip
        o_tile = first % batch * (n_down * n_across) + first // batch
        tl.store(p_logdet + o_tile, logdet)
        if p_peak is not None:
            tl.store(p_peak + o_tile, peak)
    else:
        PITCH: tl.constexpr = ACROSS * COLUMNS + 2
        NEAR: tl.constexpr = (DOWN * ROWS + 2) * PITCH
        regions_across = tl.cdiv(n_across, ACROSS)
        for i in tl.range(first, batch.to(tl.int64) * tl.cdiv(n_down, DOWN) * regions_across, PROGRAMS):
            i_b, i_region = (i % batch).to(tl.int64), (i // batch).to(tl.int32)
            i_row, i_column = i_region // regions_across * DOWN, i_region % regions_across * ACROSS
            for i_part in tl.range((NEAR + TILE - 1) // TILE):
                o = i_part * TILE + tl.arange(0, TILE)[:, None]
                pixel = pixels_at(i_b, i_row * ROWS - 1 + o // PITCH, i_column * COLUMNS - 1 + o % PITCH, height, width)
                o_near, m = first * NEAR + o, pixel[3] & (o < NEAR)
                pixel = i_b, pixel[1], pixel[2], m, pixel[4], pixel[5]
                store_hidden(
                    z, pre, p_w1, p_w2, p_b2, None, h2, pixel, (i_b, pixel[1], pixel[2], m, o_near, o_near), height, width,
                    pass_through, hidden, PRECISION, UNROLLED, HS, BLOCK_N, BLOCK_K, BLOCKS_K,
                )  # fmt: skip
            tl.debug_barrier()
            for i_part in tl.range(DOWN * ACROSS):
                i_down, i_across = i_row + i_part // ACROSS, i_column + i_part % ACROSS
                if (i_down < n_down) & (i_across < n_across):
                    o, i_p = tl.arange(0, TILE)[:, None], i_down * n_across + i_across
                    pixel = rectangle(i_b, i_p, height, width, ROWS, COLUMNS)
                    o_row = i_part // ACROSS * ROWS + o // COLUMNS + 1
                    o_near = first * NEAR + o_row * PITCH + i_part % ACROSS * COLUMNS + o % COLUMNS + 1
                    stored = i_b, pixel[1], pixel[2], pixel[3], o_near, o_near
                    logdet, peak = finish_tile(
                        z, h2, p_w3, p_b3, mix, p_offset, injector, y, h, pixel, stored, PITCH, height, width, eps,
                        pass_through, channels, hidden, INVERSE, PRECISION, UNROLLED, TILE, OUTS, BLOCK_C, READ, READS,
                    )  # fmt: skip
                    o_tile = i_b * (n_down * n_across) + i_p
                    tl.store(p_logdet + o_tile, logdet)
                    if p_peak is not None:
                        tl.store(p_peak + o_tile, peak)
            tl.debug_barrier()


def step_network_coupled(
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    mix: Tensor | None,
    offset: Tensor | None,
    injector: Tensor | None,
    eps: float,
    inverse: bool,
    *,
    tf32: bool = False,
    packed: Sequence[Tensor] = (),
    watched: bool = False,
    with_output: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """As the reference's; shares of the log-det and peaks are (B, tiles)."""
    check_dtype(x)
    check_dtype(pre, "pre")
    fused = mix is None or x.shape[1] <= MIXED
    h = empty_channels_last((x.shape[0], *w3.shape[:1], *x.shape[2:]), x, pre.dtype) if with_output else None
    if x.numel() == 0:
        return empty_like(x), (x.new_zeros(x.shape[0], dtype=torch.float32),), x.new_zeros(x.shape[0], 0), h
    network = packed_network(w1, w2, w3, pre.dtype, packed)
    maps = (mix, offset, injector) if fused else (None, None, None)
    y, logdet, peak = _launch(x, pre, network, b2, b3, *maps, h, eps, inverse, arithmetic(pre, tf32), watched and fused)
    if fused or mix is None or offset is None:
        return y, (logdet,), peak, h
    h_before, h_after = (injector, None) if inverse else (None, injector)
    y, others, peak = flow_step_parts(y, mix, offset, h_before, h_after, eps, inverse, watched)
    return y, (logdet, others), peak, h


def _launch(
    x: Tensor,
    pre: Tensor,
    network: Packed,
    b2: Tensor,
    b3: Tensor,
    mix: Tensor | None,
    offset: Tensor | None,
    injector: Tensor | None,
    h: Tensor | None,
    eps: float,
    inverse: bool,
    kind: str,
    watched: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, and of every tile the share of the log-det and if `watched` the largest magnitude."""
    (batch, channels, height, width), hidden, (hs, outs) = x.shape, pre.shape[1], network.w3.shape[1:]
    pass_through, y = channels - b3.shape[0] // 2, empty_like(x)
    sums = max(SUMS[min(64, block(channels))], hs, outs)
    twice = kind == "half" and sums > MOST_SUMS
    tiles, options = tiling(kind, height, width, sums // 2 if twice else sums)
    if twice:
        options["num_warps"] = 8
    parts = torch.empty(1 + watched, batch, tiles, dtype=torch.float32, device=x.device)
    regions, programs = batch * triton.cdiv(height, REGION[0]) * triton.cdiv(width, REGION[1]), batch * tiles
    inside = regions >= ROUNDS * PROGRAMS  # the first layers are in the kernel
    if inside:
        programs, rows, columns = PROGRAMS, REGION[0] + 2, REGION[1] + 2
        h2 = empty_channels_last((programs, hidden, rows, columns), pre)
    else:
        h2 = empty_channels_last((batch, hidden, height, width), pre)
        launch_hidden(x[:, :pass_through], pre, network, b2, None, h2, kind)
    launch(
        coupled_step_kernel,
        programs,
        x.device,
        z=image(x),
        pre=image(pre) if inside else None,
        p_w1=network.w1,
        p_w2=network.w2,
        p_b2=dense(b2),
        h2=image(h2),
        p_w3=network.w3,
        p_b3=dense(b3),
        mix=None if mix is None else matrix(mix),
        p_offset=None if offset is None else dense(offset),
        injector=image(injector),
        y=image(y),
        h=image(h),
        p_logdet=parts[0],
        p_peak=parts[1] if watched else None,
        batch=batch,
        height=height,
        width=width,
        eps=eps,
        pass_through=pass_through,
        channels=channels,
        hidden=hidden,
        INVERSE=inverse,
        DOWN=REGION[0] // options["ROWS"],
        ACROSS=REGION[1] // COLUMNS,
        PROGRAMS=programs if inside else 0,
        HS=hs,
        OUTS=outs,
        BLOCK_C=block(channels),
        BLOCK_N=min(HIDDEN, hs),
        BLOCK_K=INPUTS,
        BLOCKS_K=network.w1.shape[1] // INPUTS,
        READ=min(HIDDEN_READ, hs),
        READS=hs // min(HIDDEN_READ, hs),
        **{**options, **(INSIDE if inside else {}), "maxnreg": REGISTERS[min(64, block(channels))]},
    )
    return y, parts[0], parts[1] if watched else None
