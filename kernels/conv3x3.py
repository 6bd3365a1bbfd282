"""The 3×3 convolution with zero padding, and its gradients, as matrix products over the nine taps d ∈ {-1, 0, 1}².

    y[p, n]     = σ(Σ_d Σ_c x[p + d, c] · w[n, c, d] + bias[n]),    σ a leaky ReLU or nothing
    dx[p, c]    = Σ_d Σ_n dy[p - d, n] · w[n, c, d]
    dw[n, c, d] = Σ_p dy[p, n] · x[p + d, c],    dbias[n] = Σ_p dy[p, n]

The first two are one kernel: dx is the convolution of dy with the transposed weight, its taps in reverse. No window is stored
in memory: a program reads its pixels, moved by a tap, once for every tap. It adds the bias and applies σ, or in the backward
pass the derivative of the previous σ, to the sums in its registers. So a dense block is one launch per convolution, which
reads the leading channels of one buffer and writes the next ones.
With nearest-neighbour upsampling, x at p + d is pixel (p + d)/2 of x, rounded down, and dx sums over the four upsampled pixels
of a pixel, with 36 taps; nothing is upsampled in memory.

Products are of tensor cores: of float16 and bfloat16 with sums in float32, and of float32 in TF32 where the caller permits
it; otherwise float32 is multiplied as such. Fewer channels than a tile has are filled up with zeros by masks.

A weight is read where it lies if its inputs are adjacent and its dtype is that of x, as a channels-last one or some inputs of
one: then lanes read 16 bytes of inputs at once, forward (along the sums) and backward (along the results). From a weight in
PyTorch's own order lanes would read single numbers, nine apart, and a program all lines of the cache that hold them nine times,
more bytes than of x. So such a weight, or one of another dtype, is copied by one small kernel first: `conv3x3_weights`, which
copies those of several convolutions at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncsr_fast.kernels._common import arithmetic, at, channel_tile, check_dtype, dense, image, launch, load, program, store
from ncsr_fast.kernels._conv3x3 import (
    cell_tile,
    channels_at,
    conv3x3_weights,
    distance,
    in_runs,
    inside,
    pixel_of,
    step,
)
from ncsr_fast.kernels._conv3x3_weight import backward_weight
from ncsr_fast.layout import empty_channels_last, writable

# Sizes of tiles: pixels, outputs and inputs (at most), and stages of loads on their way; by how numbers are multiplied. Chosen
# for instructions, registers and shared memory by the ahead-of-time report (ncsr_fast.kernels.ahead_of_time), never timed: no
# GPU yet.
OPTIONS = {
    "half": {"BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    "tf32": {"BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "ieee": {"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
}


@triton.jit(do_not_specialize=["height", "width"])
def conv3x3_kernel(
    x,  # (B, inputs, H, W)
    weight,  # pointer, and strides of an input, an output and a tap
    p_bias,  # (outputs,) or None
    relu,  # (B, outputs - gated, H, W) or None: output of the leaky ReLU whose derivative the last outputs are multiplied by
    added,  # images (B, outputs, H, W), each with its factor, that are added to y, or None
    y,  # (B, outputs, H, W)
    slope,  # of the leaky ReLU
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    gated: tl.constexpr,
    height,
    width,
    LEAKY: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPSAMPLE2X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = σ(w ∗ x + bias) and what is added to it, with ACCUMULATE what y holds, times σ' of `relu`; for a tile of cells and
    outputs."""
    READ: tl.constexpr = 2 if UPSAMPLE2X and TRANSPOSED else 1
    WRITTEN: tl.constexpr = 2 if UPSAMPLE2X and not TRANSPOSED else 1
    BLOCKS_K: tl.constexpr = (inputs + BLOCK_K - 1) // BLOCK_K
    i_b, i_p, i = program(WRITTEN * WRITTEN * tl.cdiv(height.to(tl.int64) * width, BLOCK_P), tl.cdiv(outputs, BLOCK_N))
    i_phase = i_p % (WRITTEN * WRITTEN)
    phase = i_phase // 2, i_phase % 2
    cell = cell_tile(i_p // (WRITTEN * WRITTEN), height, width, BLOCK_P)
    o_n, o_k = channel_tile(i, BLOCK_N), channel_tile(0, BLOCK_K)
    o_row = tl.trans(o_k)
    p_x = at(x, pixel_of(cell, i_b, (0, 0), height, width, READ), 0) + channels_at(x, o_k)
    p_weight = weight[0] + o_row * weight[1] + o_n * weight[2]
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(9 * READ * READ * BLOCKS_K):
        i_tap, i_k = i // BLOCKS_K, i % BLOCKS_K * BLOCK_K
        rows, columns = step(i_tap, phase, READ, WRITTEN)
        i_w = 8 - i_tap % 9 if TRANSPOSED else i_tap
        p = p_x + (distance(x, rows, columns, READ * width) + channels_at(x, i_k))
        b_x = tl.load(p, mask=inside(cell, rows, columns, height, width, READ) & (o_k < inputs - i_k), other=0.0)
        m_weight = (o_row < inputs - i_k) & (o_n < outputs)
        b_w = tl.load(p_weight + (i_k * weight[1] + i_w * weight[3]), mask=m_weight, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    pixel = pixel_of(cell, i_b, phase, height, width, WRITTEN)
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=o_n < outputs, other=0.0).to(tl.float32)
    if LEAKY:
        acc = tl.where(acc > 0, acc, acc * slope)
    if ACCUMULATE:
        acc += load(y, pixel, o_n, o_n < outputs)
    if added is not None:
        for i_added in tl.static_range(len(added)):
            acc += added[i_added][1] * load(added[i_added][0], pixel, o_n, o_n < outputs)
    if relu is not None:
        b_relu = load(relu, pixel, o_n - gated, (o_n >= gated) & (o_n < outputs))
        acc = tl.where((b_relu > 0) | (o_n < gated), acc, acc * slope)
    store(y, pixel, o_n, acc, o_n < outputs)


def conv3x3_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    upsample2x: bool = False,
    slope: float = 1.0,
    tf32: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """`conv3x3_forward` of the reference; fastest for adjacent channels, in multiples of 16, and `conv3x3_weights`."""
    if out is None:
        side = 2 if upsample2x else 1
        shape = x.shape[0], weight.shape[0], x.shape[2] * side, x.shape[3] * side
        out, accumulate = empty_channels_last(shape, x), False
    convolve(x, weight, bias, out, slope, accumulate=accumulate, upsample2x=upsample2x, tf32=tf32)
    return out


def conv3x3_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
    *,
    upsample2x: bool = False,
    relu: tuple[Tensor, float] | None = None,
    tf32: bool = False,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`conv3x3_backward` of the reference; gradients of weight and bias are float32 unless `dweight` has another dtype."""
    if needed[0]:
        output, slope = relu or (None, 1.0)
        accumulate, dx = dx is not None, empty_channels_last((len(dy), *x.shape[1:]), dy) if dx is None else dx
        convolve(dy, weight, None, dx, slope, output, accumulate=accumulate, transposed=True, upsample2x=upsample2x, tf32=tf32)
    if not (needed[1] or needed[2]):
        return dx, None, None
    check_dtype(x)
    if dweight is None:
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    dbias = torch.empty(weight.shape[0], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    backward_weight(dy, x, writable(dweight), dbias, upsample2x=upsample2x, tf32=tf32)
    return dx, dweight, dbias


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    slope: float = 1.0,
    relu: Tensor | None = None,
    added: Sequence[tuple[Tensor, float]] = (),
    *,
    accumulate: bool = False,
    transposed: bool = False,
    upsample2x: bool = False,
    tf32: bool = False,
) -> None:
    """Launch the kernel: write y, or with `transposed` the gradient y of the input from that of the output, x.

    added: images of the shape of y, each with its factor, that are added to the result before the gate of `relu`
    """
    check_dtype(x)
    if y.numel() == 0:
        return
    (weight,) = conv3x3_weights([weight], x.dtype)
    by_output, by_input, _, by_tap = weight.stride()
    strides = (by_output, by_input, by_tap) if transposed else (by_input, by_output, by_tap)
    inputs, outputs, kind = x.shape[1], y.shape[1], arithmetic(x, tf32)
    images = [each for each in (x, y, relu, *(each for each, _ in added)) if each is not None]
    options = _options(kind, inputs, outputs, all(map(in_runs, images)))
    cells = min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3])
    phases = 4 if upsample2x and not transposed else 1
    tiles = phases * triton.cdiv(cells[0] * cells[1], options["BLOCK_P"]) * triton.cdiv(outputs, options["BLOCK_N"])
    launch(
        conv3x3_kernel,
        x.shape[0] * tiles,
        x.device,
        x=image(x),
        weight=(weight, *map(tl.constexpr, strides)),
        p_bias=None if bias is None else dense(bias),
        relu=image(relu),
        added=tuple((image(each), float(factor)) for each, factor in added) or None,
        y=image(writable(y)),
        slope=float(slope),
        inputs=inputs,
        outputs=outputs,
        gated=outputs if relu is None else outputs - relu.shape[1],
        height=cells[0],
        width=cells[1],
        LEAKY=slope != 1 and relu is None,
        ACCUMULATE=accumulate,
        TRANSPOSED=transposed,
        UPSAMPLE2X=upsample2x,
        PRECISION="tf32" if kind == "tf32" else "ieee",
        **options,
    )


def _options(kind: str, inputs: int, outputs: int, runs: bool) -> dict[str, int]:
    """Sizes of the tiles: no wider than the channels, and if possible inputs at once that divide their number.

    Without `runs` of 16 bytes, every number with an address of its own, tiles are smaller and divided among more warps, and a
    thread may have all registers: else some spill.
    """
    options = dict(OPTIONS[kind])
    if not runs:
        options |= {"BLOCK_P": 64, "BLOCK_K": min(32, options["BLOCK_K"]), "num_warps": 8, "maxnreg": 255}
    options["BLOCK_N"] = min(options["BLOCK_N"], max(16, triton.next_power_of_2(outputs)))
    widths = [width for width in (64, 32, 16) if width <= options["BLOCK_K"]]
    options["BLOCK_K"] = next((width for width in widths if inputs % width == 0), widths[0])
    options["BLOCK_K"] = min(options["BLOCK_K"], max(16, triton.next_power_of_2(inputs)))
    return options
