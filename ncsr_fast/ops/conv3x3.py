"""Convolutions at a stated precision, forward and backward; 3×3 convolutions run in the backends' kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.autocast import autocast
from ncsr_fast.layout import empty_channels_last, is_channels_last
from ncsr_fast.ops.backend import COVERAGE, covering_backend, kernels, resolve_backend
from ncsr_fast.ops.contract import check_image, check_tensors
from ncsr_fast.ops.operator import Operator, Outputs, Tensors
from ncsr_fast.ops.plain_convolution import Gradients, Needed, convolve, convolve_as_recorded, convolve_backward
from ncsr_fast.ops.registration import Signature

# From so many channels in and out on, Winograd's transforms cost less than they save: with 64 and 12 channels at 80×80 pixels,
# the gradients take 1.7 ms, oneDNN's 2.7 (2 cores with AVX2); with 64 and 6 both take the same time.
_WORTH_IT = 12


class ConvolutionMethod(NamedTuple):
    """Precision and backend of convolutions, which hold whatever PyTorch's global flags say."""

    tf32: bool = False  # True: a GPU may round float32 operands to TF32
    backend: str = "auto"  # "reference": by PyTorch alone


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upsample2x: bool = False,
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The 3×3 convolution `weight ∗ x + bias` with zero padding that preserves the size, in the dtype of x.

    The convolution is computed in true float32 whatever PyTorch's global flags say, unless `tf32` permits a GPU to round the
    operands. It is differentiable with respect to every tensor. "native" uses Winograd's algorithm on the CPU, F(4×4, 3×3) and
    F(2×2, 3×3) (Lavin & Gray 2016), so a NaN or an infinity may spread three pixels further; "auto" takes it for channels-last
    x of 12 channels or more. "triton" multiplies on tensor cores if x is in half precision or `tf32` permits it; "auto" does
    not take it until it has been measured.

    Args:
        x: (B, C, H, W), float32, float64 or a half-precision dtype.
        weight: (N, C, 3, 3).
        bias: (N,), or None.
        upsample2x: Read x as upsampled ×2 by nearest neighbour: y is (B, N, 2H, 2W).
        tf32: Permit TF32 on a GPU, unless PyTorch's flags forbid it.
        backend: "auto"; "reference"; "native" for float32 and float64 tensors on the CPU; "triton" for CUDA tensors of any
            dtype but float64.

    Returns:
        y (B, N, H, W).

    Raises:
        ValueError, TypeError: A wrong shape, dtype or device; the message names the argument.

    Example:
        >>> y = ops.conv3x3(torch.rand(1, 64, 40, 40), torch.rand(32, 64, 3, 3), upsample2x=True)
    """
    _, channels, _, _ = check_image("conv3x3", "x", x)
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    check_tensors("conv3x3", x, ("weight", weight, (outputs, channels, 3, 3)))
    if bias is not None:
        check_tensors("conv3x3", x, ("bias", bias, (outputs,)))
    resolved = resolve_backend("conv3x3", backend, x)
    if backend == "auto":
        resolved = convolution_backend(x, weight, ConvolutionMethod())
    return _conv3x3((x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), upsample2x, tf32, resolved)[0]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, method: ConvolutionMethod | None) -> Tensor:
    """The k×k convolution of x (B, C, H, W), k odd, with zero padding that preserves the size, in the dtype of x.

    `method` holds for the convolution and for its gradients; None is PyTorch's convolution in true float32, for references.
    Under `torch.autocast` the dtype is autocast's.
    """
    x, method = autocast(x), _PYTORCH if method is None else method
    return _conv3x3((x, weight, bias), False, method.tf32, convolution_backend(x, weight, method))[0]


_PYTORCH = ConvolutionMethod(backend="reference")


def convolution_backend(x: Tensor, weight: Tensor, method: ConvolutionMethod) -> str:
    """The backend for a convolution of x: a kernel if layout and numbers of channels make it faster, else "reference".

    "triton" by name is taken for all 3×3 convolutions: it reads images in any layout, and weights of any dtype.
    """
    return backend_for(x, tuple(weight.shape), weight.dtype, method)


def backend_for(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, method: ConvolutionMethod) -> str:
    """`convolution_backend` for a weight of this shape and dtype."""
    if method.backend == "reference" or shape[-1] != 3:
        return "reference"
    if method.backend != "triton" and (min(shape[:2]) < _WORTH_IT or x.dtype != dtype or not is_channels_last(x)):
        return "reference"
    return covering_backend("conv3x3", method.backend, x)


def convolution_weights(weights: Sequence[Tensor], x: Tensor, method: ConvolutionMethod) -> list[Tensor]:
    """The weights in the layout that the backend for x and the first weight reads best."""
    backend = convolution_backend(x, weights[0], method)
    own = "conv3x3_weights" in COVERAGE.get(backend, {})
    return kernels(backend if own else "reference").conv3x3_weights(weights, x.dtype)


def convolution_forward(x: Tensor, weight: Tensor, bias: Tensor | None, method: ConvolutionMethod) -> Tensor:
    """`convolution` without autograd."""
    return _forward((x, weight, bias), False, method.tf32, convolution_backend(x, weight, method))[0][0]


def convolution_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, slope: float, method: ConvolutionMethod) -> None:
    """Write leaky_relu(weight ∗ x + bias) to `out`, which may be other channels of the same memory as x."""
    backend = convolution_backend(x, weight, method)
    kernels(backend).conv3x3_forward(x, weight, bias, slope=slope, tf32=method.tf32, out=out)


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: Needed,
    method: ConvolutionMethod,
    dx: Tensor | None = None,
    relu: tuple[Tensor, float] | None = None,
    dweight: Tensor | None = None,
) -> Gradients:
    """Gradients of x, weight and bias of `convolution`; the arguments are those of `ops.reference.conv3x3_backward`."""
    if weight.shape[-1] != 3:
        return convolve_backward(dy, x, weight, needed, method.tf32)
    backend = convolution_backend(x, weight, method)
    return kernels(backend).conv3x3_backward(dy, x, weight, needed, relu=relu, tf32=method.tf32, dx=dx, dweight=dweight)


def _forward(
    tensors: tuple[Tensor, Tensor, Tensor | None], upsample2x: bool, tf32: bool, backend: str
) -> tuple[tuple[Tensor], Tensors]:
    x, weight, bias = tensors
    if weight.shape[-1] != 3:
        return (convolve(x, weight, bias, tf32),), ()
    return (kernels(backend).conv3x3_forward(x, weight, bias, upsample2x=upsample2x, tf32=tf32),), ()


def _backward(
    grads: tuple[Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None],
    _: Tensors,
    needed: Needed,
    upsample2x: bool,
    tf32: bool,
    backend: str,
) -> Tensors:
    x, weight, bias = tensors
    if weight.shape[-1] != 3:
        dx, dweight, dbias = convolve_backward(grads[0], x, weight, needed, tf32)
    else:
        backward = kernels(backend).conv3x3_backward
        dx, dweight, dbias = backward(grads[0], x, weight, needed, upsample2x=upsample2x, tf32=tf32)
    return dx, _like(dweight, weight), _like(dbias, bias)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of its parameter."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, upsample2x: bool, tf32: bool, _: str) -> Outputs:
    x = F.interpolate(x, scale_factor=2, mode="nearest") if upsample2x else x
    return (convolve_as_recorded(x, weight, bias, tf32),)


def _fake(x: Tensor, weight: Tensor, _: Tensor | None, upsample2x: bool, *__: object) -> tuple[Tensor]:
    """The backend with a kernel writes channels-last whatever x is."""
    factor = 2 if upsample2x else 1
    shape = x.shape[0], weight.shape[0], x.shape[2] * factor, x.shape[3] * factor
    return (empty_channels_last(shape, x),)


_conv3x3 = Operator(
    "conv3x3",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature(
        "Tensor x, Tensor weight, Tensor? bias", "bool upsample2x, bool tf32, str backend", fake=_fake, outputs=1
    ),
    autograd_of_reference=False,
)
