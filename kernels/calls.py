"""Calls of every host function on meta tensors, at shapes of the published models, for reports that launch nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ncsr_fast import kernels
from ncsr_fast.ops.network_gradients import NetworkPass, StepNetwork
from ncsr_fast.ops.plain_dense_blocks import DenseBlocks

Call = tuple[str, str, Callable]  # operator, name and body
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of h
Variant = tuple[str, str, str]  # direction, layout and dtype of a call
EVERY_VARIANT: tuple[Variant, ...] = tuple(itertools.product(("forward", "inverse"), LAYOUTS, DTYPES))
# "pairs": every pair of direction, layout and dtype is in one of them; "forward", "inverse": calls in the engine's layout
PAIRS: tuple[Variant, ...] = (
    ("forward", "nhwc", "float32"),
    ("inverse", "nhwc", "bfloat16"),
    ("forward", "nchw", "bfloat16"),
    ("inverse", "nchw", "float32"),
)
VARIANTS = {"every": EVERY_VARIANT, "pairs": PAIRS, "forward": PAIRS[:1], "inverse": PAIRS[1:2]}
CONVOLUTIONS = ((32, False), (64, False), (64, True))  # of the encoder: outputs, and whether the input is read upsampled
PRECISIONS = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
FACTORS = (2, 1)  # upsampling of the stacked features at the first level of the published ×4 models, and at the others
STEPS = 16  # of a level of the published ×4 models
NETWORKS = 32  # that read the features at a level of those: injectors and couplings of 16 steps
FEATURES = 320  # channels of the condition of the published networks
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
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]
        z1 = _image(size, channels, torch.float32)[:, : channels // 2]
        own, shared = _pre_activations(size, dtype)
        coupling, injector = _network(channels // 2, channels, dtype), _network(0, 2 * channels, dtype)
        yield "step_network", f"coupling {precision}", lambda: kernels.step_network_forward(z1, own, *coupling, tf32=tf32)
        yield "step_network", f"shared {precision}", lambda: kernels.step_network_layers(z1, shared, *coupling, tf32=tf32)
        yield "step_network", f"injector {precision}", lambda: kernels.step_network_forward(None, own, *injector, tf32=tf32)


def coupled_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Likewise with the maps behind: encoding and keeping the outputs, decoding samples that share the condition, and alone."""
    mix, forward = torch.empty(channels, channels, device="meta"), kernels.step_network_coupled
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]
        x, (own, shared) = _image(size, channels, torch.float32), _pre_activations(size, dtype)
        network = _network(channels // 2, channels, dtype)
        injector = _image(size, 2 * channels, dtype)
        one, options = injector[:1].expand(size[0], -1, -1, -1), {"tf32": tf32, "packed": _packed(network)}
        encoding, decoding = (mix, mix[0], injector, 1e-4, False), (mix, mix[0], one, 1e-4, True)
        alone = None, None, None, 1e-4, True
        yield "step_network", f"encoding {precision}", lambda: forward(x, own, *network, *encoding, with_output=True, **options)
        yield "step_network", f"decoding {precision}", lambda: forward(x, shared, *network, *decoding, watched=True, **options)
        yield "step_network", f"coupling {precision}", lambda: forward(x, shared, *network, *alone, **options)


def large_coupled_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """The calls of `coupled_calls` for ten times as many samples, which take another kernel."""
    return coupled_calls(channels, (10 * size[0], *size[1:]), precisions)


def _image(size: tuple[int, int, int], channels: int, dtype: torch.dtype) -> Tensor:
    batch, height, width = size
    shape = batch, channels, height, width
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _pre_activations(size: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Pre-activations of one network among several: one tensor with those of every sample, one that all samples share."""
    batch, height, width = size
    own, one = (_image((count, height, width), 4 * HIDDEN, dtype)[:, HIDDEN : 2 * HIDDEN] for count in (batch, 1))
    return [own, one.expand(batch, -1, -1, -1)]


def _network(inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor | None]:
    shapes = (HIDDEN, inputs, 3, 3), (HIDDEN, HIDDEN, 1, 1), (HIDDEN,), (outputs, HIDDEN, 3, 3), (outputs,)
    return [torch.empty(shape, dtype=dtype, device="meta") if all(shape) else None for shape in shapes]


def _packed(network: Sequence[Tensor | None], transposed: bool = False) -> list[Tensor]:
    """The weights of a network packed, which the engine does once for many."""
    w1, w2, _, w3, _ = network
    assert w2 is not None and w3 is not None
    stacks = kernels.step_network_weights(None if w1 is None else w1[None], w2[None], w3[None], w2.dtype, transposed)
    return [stack[0] for stack in stacks]


def network_backward_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Likewise of the gradients of `step_network`, hidden layers recomputed or saved: of a coupling, of two injectors."""
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]
        state, sources = _image(size, channels, torch.float32), _image(size, 4 * HIDDEN, dtype)
        for name, inputs, outputs, count in (("coupling", channels // 2, channels, 1), ("injectors", 0, 2 * channels, 2)):
            networks = [StepNetwork._make(_network(inputs, outputs, dtype))] * count
            z1 = [state[:, :inputs] if inputs else None] * count
            pre, dpre = ([sources[:, HIDDEN * i : HIDDEN * (i + 1)] for i in range(count)] for _ in range(2))
            h1, h2, dh = ([_image(size, c, dtype) for _ in range(count)] for c in (HIDDEN, HIDDEN, outputs))
            saved = list(zip(h1 if inputs else [None] * count, h2))
            packed = [[*_packed(network), *_packed(network, transposed=True)] for network in networks]

            def backward(hidden: list | None) -> None:
                layers = kernels.step_network_backward(dh, z1, pre, hidden, networks, dpre, z1, tf32=tf32, packed=packed)
                h1, h2, dh2, sums = zip(*layers)
                passes = list(map(NetworkPass, z1, pre, h1, h2, dpre, dh2, dh, sums))
                kernels.step_network_weights_backward(passes, networks, tf32=tf32)

            yield "step_network", f"{name} backward {precision}", partial(backward, None)
            yield "step_network", f"{name} backward saved {precision}", partial(backward, saved)


def together_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Likewise of what the steps of a level do at once: the outputs of all injectors, the gradients of all mixes."""
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]
        pre, state = _image(size, STEPS * HIDDEN, dtype), _image(size, channels, torch.float32)
        _, *weights = _network(0, 2 * channels, dtype)
        stacks = [torch.empty(STEPS, *weight.shape, dtype=dtype, device="meta") for weight in weights if weight is not None]
        packed = kernels.step_network_weights(None, stacks[0], stacks[2], dtype)
        step = state, state, _image(size, channels, dtype), _image(size, 2 * channels, dtype)
        yield "step_network", f"tails {precision}", partial(kernels.step_network_tails, pre, *stacks, tf32=tf32, packed=packed)
        yield "flow_step", f"mixes {precision}", partial(kernels.flow_step_mix_backward, [step] * STEPS, 1e-4, False)


def filter_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Likewise of `fold_filters`, of the networks of a level of 16 steps: couplings and injectors."""
    for precision in precisions:
        dtype, half = PRECISIONS[precision][0], channels // 2
        inputs = [half + FEATURES, HIDDEN, HIDDEN, FEATURES, HIDDEN, HIDDEN]
        outputs = [HIDDEN, HIDDEN, channels, HIDDEN, HIDDEN, 2 * channels]
        weights = [torch.empty(16, n, c, k, k, device="meta") for n, c, k in zip(outputs, inputs, (3, 1, 3) * 2)]
        biases = [torch.empty(16, n, device="meta") for n in outputs]
        factors, first = [1.0, 1.0, 3.0] * 2, [half, HIDDEN, HIDDEN, 0, HIDDEN, HIDDEN]

        def fold() -> None:
            folded = kernels.fold_filters_forward(weights, biases, biases, factors, first, dtype)
            kernels.fold_filters_backward(*folded, weights, biases, biases, factors)

        yield "fold_filters", f"any {precision}", fold


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


def dense_block_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Likewise of three residual blocks of so many features, the first two of which are kept, forward and backward."""
    batch, height, width = size
    growth, blocks = channels // 2, DenseBlocks(dense=3, convolutions=5, kept=(0, 1, 2), slope=0.2, residual=0.2)
    dense_block = [(growth if i < 4 else channels, channels + i * growth) for i in range(5)]
    shapes = dense_block * (blocks.dense * len(blocks.kept))
    weights = [torch.empty(*shape, 3, 3, device="meta") for shape in shapes]
    biases = [torch.empty(outputs, device="meta") for outputs, _ in shapes]
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]

        def image(c: int, batch: int = batch, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(batch, c, height, width, dtype=dtype, device="meta", memory_format=torch.channels_last)

        x, saved = image(channels), image(3 * channels, len(shapes) // 5 * batch)
        arguments = weights, biases, blocks
        yield (
            "conv3x3",
            f"residual blocks {precision}",
            lambda: (
                kernels.dense_blocks_forward(x, *arguments, tf32=tf32),
                kernels.dense_blocks_backward([x] * 3, saved, *arguments, (True, True), tf32=tf32),
            ),
        )


def hoisting_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Call]:
    """Likewise of hoisted convolutions of so many own features, and four times as many stacked ones of this size."""
    batch, height, width = size
    for precision, factor in itertools.product(precisions, FACTORS):
        dtype, tf32 = PRECISIONS[precision]

        def image(c: int, factor: int = 1, dtype: torch.dtype = dtype) -> Tensor:
            shape = batch, c, factor * height, factor * width
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

        own, stacked, dy = image(channels, factor), image(4 * channels), image(NETWORKS * HIDDEN, factor)
        weight = torch.empty(NETWORKS * HIDDEN, 5 * channels, 3, 3, dtype=dtype, device="meta")
        bias, needed = torch.empty(NETWORKS * HIDDEN, dtype=dtype, device="meta"), (True, True, True)
        yield (
            "conv3x3",
            f"hoisted by {factor} {precision}",
            lambda: (
                kernels.hoisted_forward(own, stacked, weight, bias, groups=NETWORKS, tf32=tf32),
                kernels.hoisted_backward(dy, own, stacked, weight, needed, tf32=tf32),
            ),
        )
