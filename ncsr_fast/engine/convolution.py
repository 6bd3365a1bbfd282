"""Convolutions by a stated method, forward and backward: at what precision, and by which algorithm on a CPU."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.autocast import autocast
from ncsr_fast.engine.function import Piece, Tensors
from ncsr_fast.layout import has_memory, is_channels_last, traced
from ncsr_fast.ops._backends import implementation, resolve_backend
from ncsr_fast.precision import convolutions_are_rounded, has_cudnn, true_float32

# Channels in and out from which Winograd's transforms cost less than they save: of 64 and 12 at 80×80 pixels, the gradients
# take 1.7 ms where oneDNN's take 2.7 (2 cores with AVX2), of 64 and 6 as long.
_WORTH_IT = 12


class ConvolutionMethod(NamedTuple):
    """How the networks are convolved."""

    precision: str = "fp32"  # as in `EngineOptions`, whatever the global flags say
    winograd: bool = True  # 3×3 convolutions of channels-last CPU tensors by Winograd's algorithm where there is a kernel


_PYTORCH = ConvolutionMethod(winograd=False)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, method: ConvolutionMethod | None) -> Tensor:
    """The k×k convolution of x (B, C, H, W), k odd, with zero padding that keeps the size, in the dtype of x.

    `method` holds for this convolution and for its gradients; None is PyTorch's own in true float32, for the reference. Under
    `torch.autocast` the dtype is the one it asks for.
    """
    return _convolution((autocast(x), weight, bias), _PYTORCH if method is None else method)[0]


# -- without gradients ---------------------------------------------------------------------------------------------


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    """PyTorch's, at a precision of `ConvolutionMethod`."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.device.type == "cuda" and has_cudnn():
        return convolution_of_cudnn(x, weight, bias, precision == "tf32")
    with true_float32(x):
        return F.conv2d(x, weight, bias, padding=_padding(weight))


def _padding(weight: Tensor) -> list[int]:
    """Of both axes: torch.jit.trace of torch 2.4 takes a number made of sizes for no number of both."""
    return [weight.shape[-1] // 2] * 2


def convolution_of_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, allow_tf32: bool) -> Tensor:
    """F.conv2d with the flag for TF32 as an argument; cuDNN's other flags are as they are now."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    flags = cudnn.benchmark, deterministic, cudnn.enabled, allow_tf32
    return torch.ops.aten._convolution.default(x, weight, bias, [1, 1], _padding(weight), [1, 1], False, [0, 0], 1, *flags)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, method: ConvolutionMethod) -> Tensor:
    """The convolution."""
    if by_winograd(x, weight, method):
        return implementation("native").conv3x3_fwd(x, weight, bias)
    return plain_convolution(x, weight, bias, method.precision)


def convolve_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, slope: float, method: ConvolutionMethod) -> None:
    """Leaky ReLU of the convolution, written to `out`, which may be other channels of the memory of x."""
    if by_winograd(x, weight, method):
        implementation("native").conv3x3_fwd(x, weight, bias, slope=slope, out=out)
    else:
        torch.ops.aten.leaky_relu.out(plain_convolution(x, weight, bias, method.precision), slope, out=out)


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: tuple[bool, bool, bool],
    method: ConvolutionMethod,
    dx: Tensor | None = None,
    gate: tuple[Tensor, float] | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those `needed`, in the dtype of x; that of x is added to `dx` where one is given.

    dweight  where that of weight is written to, if given: some of the inputs of a dense one
    gate     the last channels of x, where a leaky relu made them, and its slope: the sum that dx is goes through it there
    """
    bent, slope = gate or (None, 1.0)
    if by_winograd(x, weight, method):
        native = implementation("native")
        if needed[0]:
            dx = native.conv3x3_bwd_input(dy, weight, gate=bent, slope=slope, out=dx, accumulate=dx is not None)
        if not (needed[1] or needed[2]):
            return dx, None, None
        return dx, *native.conv3x3_bwd_weight(dy, x, out=dweight)
    with contextlib.nullcontext() if _rounds(x, method) else true_float32(x):
        found, dfound, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), [weight.shape[0]], [1, 1], _padding(weight), [1, 1], False, [0, 0], 1, needed
        )
    if dx is None or found is None:
        dx = found
    else:
        dx.add_(found)
    if bent is not None:
        last = dx[:, -bent.shape[1] :]
        torch.ops.aten.leaky_relu_backward.grad_input(last, bent, slope, True, grad_input=last)
    return dx, dfound if dweight is None or dfound is None else dweight.copy_(dfound), dbias


def _rounds(x: Tensor, method: ConvolutionMethod) -> bool:
    """True if the operands of the convolution of x may be rounded to TF32 where PyTorch's flags do not forbid it."""
    return method.precision == "tf32" and x.device.type == "cuda"


def by_winograd(x: Tensor, weight: Tensor, method: ConvolutionMethod) -> bool:
    """Whether a kernel does the convolution of x by Winograd's algorithm."""
    if not method.winograd or weight.shape[-1] != 3 or min(weight.shape[:2]) < _WORTH_IT:
        return False
    same = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    kernel = same and is_channels_last(x) and resolve_backend("convolution", "auto", x) == "native"
    return kernel and has_memory(x) and has_memory(weight) and not traced()


# -- as a differentiable piece -------------------------------------------------------------------------------------


def _forward(tensors: Tensors, method: ConvolutionMethod) -> tuple[Tensors, Tensors]:
    return (convolve(*tensors, method),), ()


def _backward(grads: Tensors, inputs: Tensors, _: Tensors, needed: tuple[bool, ...], method: ConvolutionMethod) -> Tensors:
    x, weight, bias = inputs
    dx, dweight, dbias = convolution_backward(grads[0], x, weight, needed, method)
    return dx, _like(dweight, weight), _like(dbias, bias)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of its parameter."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, method: ConvolutionMethod) -> Tensors:
    """PyTorch's convolution, in float64 where the flags would round operands and the method does not: what autograd or a
    transform makes of it runs when the flags are the program's again. In a compiled graph it is as the flags say."""
    exact = x.dtype != torch.float32 or _rounds(x, method) or torch.compiler.is_compiling()
    dtype = x.dtype if exact or not convolutions_are_rounded(x.device.type) else torch.float64
    bias = None if bias is None else bias.to(dtype)
    return (F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=_padding(weight)).to(x.dtype),)


_convolution = Piece("Convolution", forward=_forward, backward=_backward, reference=_reference)
