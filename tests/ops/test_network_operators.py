"""`conv3x3`, `step_network` and `fold` on every backend that has them: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, laid_out
from network_cases import (
    CALLS,
    arguments,
    calls,
    cells,
    cells_of,
    differentiable,
    formula,
    given,
    gradients,
    run,
    tolerance,
    weights_of,
)
from operator_cases import ROUNDING, assert_close, exact_dtype, interpreted, marked, where
from torch import Tensor

from ncsr_fast import ops

SINGLE, DOUBLE = torch.float32, torch.float64


@where
def in_its_dtypes(name: str, backend: str, dtype: torch.dtype) -> bool:
    """The compiled module convolves in float32 and float64, and folds tensors of every dtype. Triton's kernels have no
    float64, and its interpreter multiplies bfloat16 wrongly."""
    if backend == "triton":
        return dtype != DOUBLE and not (interpreted(backend) and dtype == torch.bfloat16)
    return backend == "reference" or dtype in (SINGLE, DOUBLE) or CALLS[name].operator == "fold"


@calls
@cells
@in_its_dtypes
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("channels, outputs", [(1, 1), (5, 4), (12, 24), (64, 64), (96, 12)])
@marked("exhaustive", lambda backend, channels: interpreted(backend) and channels > 5)
@marked("slow", lambda backend, channels, dtype: interpreted(backend) and (channels, dtype) != (5, torch.float16))
def test_values(name, device, backend, dtype, channels, outputs):
    tensors = arguments(name, channels, outputs, (5, 6), dtype=dtype, device=device)
    found, expected = run(name, *tensors, backend=backend), formula(name, *tensors)
    for value, right in zip(found, expected, strict=True):
        assert value.dtype == (DOUBLE if CALLS[name].operator == "fold" else dtype)
        assert value.device == right.device
        assert_close(value, right, tolerance(name, dtype), name)


@calls
@cells
@pytest.mark.parametrize("channels, outputs", [(1, 1), (5, 4), (12, 24), (64, 64)])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@in_its_dtypes
@marked("slow", interpreted)
@marked("exhaustive", lambda backend, channels: interpreted(backend) and channels != 5)
def test_gradients(name, device, backend, dtype, channels, outputs):
    """Of every tensor through every output, beside autograd of the definition."""
    tensors = differentiable(arguments(name, channels, outputs, (4, 5), dtype=dtype, device=device))
    doubles = differentiable([None if tensor is None else tensor.double() for tensor in tensors])
    expected_outputs = formula(name, *doubles)
    weights = weights_of(expected_outputs)
    expected = gradients(expected_outputs, weights, doubles)
    found = gradients(run(name, *tensors, backend=backend), weights, tensors)
    # of float32 parameters the gradient of log|det| is computed in float32; longer sums
    allowed = 20 * max(tolerance(name, dtype), ROUNDING[dtype])
    for grad, right, tensor in zip(found, expected, given(tensors), strict=True):
        assert grad.dtype == tensor.dtype
        assert_close(grad, right, allowed, f"{name}: gradient of shape {tuple(grad.shape)}")


@calls
@cells
@where(lambda backend: backend != "triton")  # which has no float64: tests/kernels/test_triton_conv3x3.py
@marked("slow", lambda name, backend: backend == "reference" or CALLS[name].operator != "fold")  # test_gradients is faster
def test_gradcheck(name, device, backend):
    """By finite differences: first gradients, and gradients of gradients, which are those of the reference."""
    size = (1, 2) if CALLS[name].operator == "step_network" else (2, 3)
    tensors = differentiable(arguments(name, 2, 2, size, batch=1, device=device))

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        rest = iter(some)
        return run(name, *(None if tensor is None else next(rest) for tensor in tensors), backend=backend)

    assert torch.autograd.gradcheck(function, given(tensors))
    assert torch.autograd.gradgradcheck(function, given(tensors))


@calls
@cells
@marked("exhaustive", interpreted)  # up to seven calls
def test_only_what_needs_a_gradient_gets_one(name, device, backend):
    """Each tensor alone: its gradient is that of all of them together, and without one nothing is recorded."""
    tensors = arguments(name, dtype=exact_dtype(backend), device=device)
    assert not any(output.requires_grad for output in run(name, *tensors, backend=backend))
    everything = differentiable(tensors)
    outputs = run(name, *everything, backend=backend)
    weights = weights_of(outputs)
    places = [index for index, tensor in enumerate(tensors) if tensor is not None]
    for index, expected in zip(places, gradients(outputs, weights, everything)):
        alone = [differentiable([tensor])[0] if place == index else tensor for place, tensor in enumerate(tensors)]
        # a kernel records all outputs, plain PyTorch those that depend on the tensor
        recorded = [pair for pair in zip(run(name, *alone, backend=backend), weights) if pair[0].requires_grad]
        (found,) = gradients(*map(list, zip(*recorded)), [alone[index]])
        assert_close(found, expected, tolerance(name, expected.dtype), f"{name}: {CALLS[name].tensors[index]}")


@calls
@cells
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@marked("exhaustive", interpreted)  # up to eight calls; layouts are in the kernels' own tests too
@marked("slow", lambda backend: backend == "reference")
def test_layouts(name, device, backend, layout):
    """All tensors and gradients of the outputs in one layout, and each of the tensors alone."""
    dtype, cases = exact_dtype(backend), ((5, 4, (3, 4)), (1, 1, (1, 4)), (12, 16, (5, 6)))
    for channels, outputs, size in cases[:1] if interpreted(backend) else cases:
        tensors = differentiable(arguments(name, channels, outputs, size, dtype=dtype, device=device))
        expected_outputs = run(name, *tensors, backend=backend)
        weights = weights_of(expected_outputs)
        expected = [*expected_outputs, *gradients(expected_outputs, weights, tensors)]
        for some in (range(len(tensors)), *[[index] for index in range(len(tensors))]):
            lying = [laid_out(tensor, layout) if index in some else tensor for index, tensor in enumerate(tensors)]
            found_outputs = run(name, *lying, backend=backend)
            found = [*found_outputs, *gradients(found_outputs, [laid_out(weight, layout) for weight in weights], lying)]
            for value, right in zip(found, expected, strict=True):
                assert_close(value, right, 10 * tolerance(name, dtype), f"{name}, {channels} channels, tensors {list(some)}")


@calls
@cells
@marked("exhaustive", interpreted)  # strides of 0 are read as others: the kernels' own tests of layouts
def test_shared_memory(name, device, backend):
    """Expanded tensors and gradients: all samples, pixels and numbers of a batch in the same memory."""
    tensors = [
        tensor if tensor is None or tensor.dim() == 2 and "weight" in tensor_name else shared(tensor)
        for tensor_name, tensor in zip(CALLS[name].tensors, arguments(name, dtype=exact_dtype(backend), device=device))
    ]
    outputs = run(name, *differentiable(tensors), backend=backend)
    weights = [torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape) for x in outputs]
    results = []
    for some in (tensors, [None if tensor is None else tensor.contiguous() for tensor in tensors]):
        leaves = differentiable(some)
        found = run(name, *leaves, backend=backend)
        results.append([*found, *gradients(found, weights, leaves)])
        weights = [weight.contiguous() for weight in weights]
    for value, right in zip(*results, strict=True):
        assert_close(value, right, 10 * tolerance(name, exact_dtype(backend)), name)


def shared(tensor: Tensor) -> Tensor:
    """An image of one pixel, or the first item of a batch, in place of all."""
    return (tensor[:1, :, :1, :1] if tensor.dim() == 4 else tensor[:1]).expand_as(tensor)


@calls
@cells
@pytest.mark.parametrize(
    "size, batch", [((1, 1), 1), ((5, 3), 1), ((1, 67), 2), ((67, 1), 1), ((37, 45), 3), ((2, 2), 0)], ids=str
)
@marked("exhaustive", lambda backend, size: interpreted(backend) and size not in ((5, 3), (2, 2)))
@where(lambda backend, size: not (interpreted(backend) and size == (37, 45)))  # minutes
@marked("slow", interpreted)
def test_sizes(name, device, backend, size, batch):
    """An empty batch too, and stacks of no, one and many maps."""
    dtype = exact_dtype(backend)
    tensors = differentiable(arguments(name, 5, 4, size, batch, dtype=dtype, device=device))
    outputs, expected = run(name, *tensors, backend=backend), formula(name, *tensors)
    weights = weights_of(expected)
    found, right = (gradients(each, weights, tensors) for each in (outputs, expected))
    for value, other in zip((*outputs, *found), (*expected, *right), strict=True):
        assert_close(value, other, 20 * tolerance(name, dtype), name)


@calls
@cells
@marked("exhaustive", interpreted)  # in the kernels' own tests all memory starts as NaN
def test_every_element_is_written(name, device, backend, monkeypatch):
    """Whatever torch hands out uninitialised is NaN here."""
    tensors = differentiable(arguments(name, 12, 12, (5, 7), dtype=SINGLE, device=device))
    weights = weights_of(run(name, *tensors, backend=backend))
    for holder, allocate in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(holder, allocate, poisoned(getattr(holder, allocate)))
    outputs = run(name, *tensors, backend=backend)
    for value in (*outputs, *gradients(outputs, weights, tensors)):
        assert value.isfinite().all()


def poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


@calls
@cells
@where(lambda device, backend: (device, backend) != ("cpu", "reference"))  # PyTorch divides its sums by the threads
@marked("exhaustive", interpreted)  # one thread
def test_same_bits_every_time_whatever_the_threads(name, device, backend, threads):
    size, batch = ((4, 5), 1) if interpreted(backend) else ((20, 21), 3)
    tensors = differentiable(arguments(name, 16, 24, size, batch, dtype=SINGLE, device=device))

    def everything() -> list[Tensor]:
        outputs = run(name, *tensors, backend=backend)
        # PyTorch computes the gradients of a network's 1×1 convolution
        recorded = [] if CALLS[name].operator == "step_network" else gradients(outputs, weights_of(outputs), tensors)
        return [*outputs, *recorded]

    first = everything()
    for count in (1, 2, 3, 7):
        threads(count)
        assert all(map(torch.equal, everything(), first)), count


@cells_of("conv3x3")
@where(lambda backend: backend != "triton")  # which has no float64: tests/kernels/test_triton_conv3x3.py
@pytest.mark.parametrize("upsample2x", [False, True])
def test_parameters_of_another_dtype(device, backend, upsample2x):
    """A convolution is computed in the dtype of x; each gradient is in the dtype of its tensor."""
    x, weight, bias = differentiable(arguments("conv3x3", 16, 12, device=device))
    single = differentiable([weight.float(), bias.float()])
    y = ops.conv3x3(x, *single, upsample2x=upsample2x, backend=backend)
    expected = ops.conv3x3(x, *(each.double() for each in single), upsample2x=upsample2x, backend=backend)
    assert y.dtype == DOUBLE and torch.equal(y, expected)
    for grad, right in zip(torch.autograd.grad(y.sin().sum(), single), torch.autograd.grad(expected.sin().sum(), single)):
        assert grad.dtype == SINGLE and torch.equal(grad, right)


@cells_of("step_network")
@marked("slow", interpreted)
def test_a_network_in_the_dtype_of_its_pre_activation(device, backend):
    """Whatever the dtypes of the state and the weights, whose gradients are in their own."""
    dtype = exact_dtype(backend)
    z1, pre, *weights = arguments("step_network", 6, 8, dtype=dtype, device=device)
    narrow = SINGLE if dtype == DOUBLE else torch.float16
    leaves = differentiable([z1.to(narrow), pre, *(weight.to(narrow) for weight in weights)])
    h = ops.step_network(*leaves, backend=backend)
    doubles = differentiable([leaf.double() for leaf in leaves])
    (expected,) = formula("step_network", *doubles)
    assert h.dtype == dtype
    assert_close(h, expected, tolerance("step_network", dtype), "h")
    for grad, right, leaf in zip(
        torch.autograd.grad(h.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), doubles), leaves
    ):
        assert grad.dtype == leaf.dtype
        assert_close(grad, right, 20 * ROUNDING[leaf.dtype], "gradient")


def test_auto_takes_a_convolution_where_it_pays(monkeypatch):
    """Channels-last x of 12 channels and more; "native" by name takes all, and half precision is the reference's."""
    native = pytest.importorskip("ncsr_fast.ops.native")
    called, forward = [], native.conv3x3_forward
    monkeypatch.setattr(native, "conv3x3_forward", lambda *args, **named: called.append(1) or forward(*args, **named))
    for channels, layout, dtype, backend, expected in (
        (12, torch.channels_last, SINGLE, "auto", 1),
        (12, torch.channels_last, DOUBLE, "auto", 1),
        (11, torch.channels_last, SINGLE, "auto", 0),
        (12, torch.contiguous_format, SINGLE, "auto", 0),
        (12, torch.channels_last, torch.bfloat16, "auto", 0),
        (12, torch.channels_last, SINGLE, "reference", 0),
        (11, torch.contiguous_format, SINGLE, "native", 1),
    ):
        x, weight, bias = arguments("conv3x3", channels, 12, dtype=dtype)
        called.clear()
        ops.conv3x3(x.contiguous(memory_format=layout), weight, bias, backend=backend)
        assert len(called) == expected, (channels, layout, dtype, backend)


@cells_of("fold")
@pytest.mark.parametrize("kind", ["singular", "nan", "infinite"])
def test_a_map_without_an_inverse_is_named(device, backend, kind):
    """On the CPU, where the inverse is wanted; the log-det alone is -∞ of a singular matrix."""
    bias, logs, weight = arguments("fold", 4, batch=3, device=device)
    weight[1, :, 2] = {"singular": 0.0, "nan": torch.nan, "infinite": torch.inf}[kind]
    mix, _, logdet = ops.fold(bias, logs, weight, backend=backend)
    assert torch.equal(mix[::2], formula("fold", bias, logs, weight)[0][::2]) and logdet[::2].isfinite().all()
    if kind == "singular":
        assert logdet[1] == -torch.inf
    if device == "cuda":  # where reading a value would make the host wait
        assert ops.fold(bias, logs, weight, inverse=True, backend=backend)[0][1].isnan().all()
        return
    with pytest.raises(ValueError, match="fold: matrix 1: weight is singular or not finite"):
        ops.fold(bias, logs, weight, inverse=True, backend=backend)


@cells
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.operator != "fold"])
def test_what_is_not_finite_stays_visible(name, device, backend):
    """A NaN pixel makes results of its own sample NaN, and no other's."""
    tensors = arguments(name, 12, 12, (6, 7), dtype=SINGLE, device=device)
    image = next(tensor for tensor in tensors if tensor is not None)
    image[0, :, 2, 3] = torch.nan
    (y,) = run(name, *tensors, backend=backend)
    assert y[0].isnan().any() and y[1].isfinite().all()
