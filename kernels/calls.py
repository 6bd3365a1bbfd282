"""Calls of every host function on meta tensors, at shapes of the published models, for reports that launch nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ncsr_fast import kernels

Call = tuple[str, str, Callable]  # operator, name and body
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of h
Variant = tuple[str, str, str]  # direction, layout and dtype of a call
EVERY_VARIANT: tuple[Variant, ...] = tuple(itertools.product(("forward", "inverse"), LAYOUTS, DTYPES))
# "pairs": every pair of direction, layout and dtype is in one of them; "engine": calls in the engine's layout
PAIRS: tuple[Variant, ...] = (
    ("forward", "nhwc", "float32"),
    ("inverse", "nhwc", "bfloat16"),
    ("forward", "nchw", "bfloat16"),
    ("inverse", "nchw", "float32"),
)
VARIANTS = {"every": EVERY_VARIANT, "pairs": PAIRS, "engine": PAIRS[:2]}
CONVOLUTIONS = ((32, False), (64, False), (64, True))  # of the encoder: outputs, and whether the input is read upsampled
PRECISIONS = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
HIDDEN = 64  # channels of the hidden layers of the published networks
SIZE = (18, 80, 80)  # batch, height and width of the calls, as in training: the weight gradient loops over many tiles


def flow_calls(channels: int, size: tuple[int, int, int] = SIZE, variants: Sequence[Variant] = EVERY_VARIANT) -> Iterator[Call]:
    """Operator, name and body of calls of every host function of a map of the state, and of matrices."""
    for direction, layout, dtype in variants:
        inverse = direction == "inverse"

        def empty(c: int, dtype: torch.dtype = torch.float32, layout: str = layout) -> Tensor:
            batch, height, width = size
            return torch.empty(batch, c, height, width, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])

        x, mix, dlogdet = empty(channels), torch.empty(channels, channels, device="meta"), torch.empty(size[0], device="meta")
        half = channels // 2
        whole, changed = empty(2 * channels, DTYPES[dtype]), empty(2 * (channels - half), DTYPES[dtype])
        name = f"{direction} {layout} h={dtype}"
        yield (
            "affine",
            name,
            lambda: (
                kernels.affine_forward(x, changed, half, 1e-4, inverse),
                kernels.affine_backward(x, dlogdet, x, changed, half, 1e-4, inverse),
            ),
        )
        yield (
            "gaussian_split",
            name,
            lambda: (
                kernels.gaussian_split_forward(x, changed, inverse),
                kernels.gaussian_split_backward(x, dlogdet, x, changed, inverse),
            ),
        )
        steps = {"flow_step": (whole, changed) if inverse else (changed, whole)}
        if dtype == "float32":  # there is no h in it
            steps["flow_step without h"] = (None, None)
        for operator, h in steps.items():
            yield (
                operator,
                name,
                lambda: (
                    kernels.flow_step_forward(x, mix, mix[0], *h, 1e-4, inverse),
                    kernels.flow_step_backward(x, dlogdet, x, x, mix, *h, 1e-4, inverse),
                ),
            )

    weight = torch.empty(18, channels, channels, dtype=torch.float64, device="meta")
    yield "inverse_logdet", "any", lambda: kernels.inverse_logdet(weight)


def network_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Calls of `step_network` as by the engine: z1 is a slice of the state, pre a slice of all pre-activations."""
    batch, height, width = size
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]

        def image(c: int, dtype: torch.dtype = dtype, batch: int = batch) -> Tensor:
            shape = batch, c, height, width
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

        def network(inputs: int, outputs: int, dtype: torch.dtype = dtype) -> list[Tensor | None]:
            shapes = (HIDDEN, inputs, 3, 3), (HIDDEN, HIDDEN, 1, 1), (HIDDEN,), (outputs, HIDDEN, 3, 3), (outputs,)
            return [torch.empty(shape, dtype=dtype, device="meta") if all(shape) else None for shape in shapes]

        z1 = image(channels, torch.float32)[:, : channels // 2]
        own, one = (image(4 * HIDDEN, batch=count)[:, HIDDEN : 2 * HIDDEN] for count in (batch, 1))
        shared, coupling, injector = one.expand(batch, -1, -1, -1), network(channels // 2, channels), network(0, 2 * channels)
        yield "step_network", f"coupling {precision}", lambda: kernels.step_network_forward(z1, own, *coupling, tf32=tf32)
        yield "step_network", f"shared {precision}", lambda: kernels.step_network_layers(z1, shared, *coupling, tf32=tf32)
        yield "step_network", f"injector {precision}", lambda: kernels.step_network_forward(None, own, *injector, tf32=tf32)


def convolution_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Calls of convolutions of some channels of a wider buffer, forward and backward."""
    batch, height, width = size
    for precision, (outputs, upsample2x) in itertools.product(precisions, CONVOLUTIONS):
        dtype, tf32 = PRECISIONS[precision]

        def empty(c: int, factor: int = 1, dtype: torch.dtype = dtype) -> Tensor:
            shape = batch, channels + 64, factor * height, factor * width
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)[:, :c]

        x, y, options = empty(channels), empty(outputs, 2 if upsample2x else 1), {"upsample2x": upsample2x, "tf32": tf32}
        weight, bias = torch.empty(outputs, channels, 3, 3, device="meta"), torch.empty(outputs, device="meta")
        relu, needed = (x[:, channels // 2 :], 0.2), (True, True, True)
        yield (
            "conv3x3",
            f"{outputs} outputs {precision}{' upsample2x' * upsample2x}",
            lambda: (
                kernels.conv3x3_forward(x, weight, bias, slope=0.2, out=y, **options),
                kernels.conv3x3_backward(y, x, weight, needed, relu=relu, dx=x, **options),
            ),
        )
