"""The network of an injector or a coupling: three convolutions 3×3 → 1×1 → 3×3, in one or two kernels of a backend.

    h1 = relu(w1 ∗ z1 + pre),   h2 = relu(w2 · h1 + b2),   h = w3 ∗ h2 + b3

`pre` is the pre-activation of the first layer: the part that depends on the condition alone, plus the bias.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.layout import empty_channels_last
from ncsr_fast.ops.backend import kernels, resolve_backend
from ncsr_fast.ops.contract import check_image, check_tensors
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution, convolution_backward
from ncsr_fast.ops.operator import Operator, Tensors
from ncsr_fast.ops.registration import Signature

Layers = tuple[Tensor, Tensor, Tensor]  # h1, h2 and h
NetworkTensors = tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]  # z1, pre and the weights


class StepNetwork(NamedTuple):
    """The weights of a network, actnorms and scales folded in."""

    w1: Tensor | None  # (hidden, C, 3, 3); None: the network does not read the state
    w2: Tensor  # (hidden, hidden, 1, 1)
    b2: Tensor  # (hidden,)
    w3: Tensor  # (outputs, hidden, 3, 3)
    b3: Tensor  # (outputs,)


def step_network(
    z1: Tensor | None,
    pre: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The output `w3 ∗ relu(w2 · relu(w1 ∗ z1 + pre) + b2) + b3` of an injector's or coupling's network, in the dtype of pre.

    Zero padding preserves the size. The network is differentiable with respect to every tensor; only its arguments are saved,
    and the hidden layers are recomputed in the backward pass.

    Args:
        z1: (B, C, H, W) of any floating-point dtype, or None with w1 None.
        pre: (B, hidden, H, W), the pre-activation.
        w1: (hidden, C, 3, 3).
        w2: (hidden, hidden, 1, 1).
        b2: (hidden,).
        w3: (outputs, hidden, 3, 3).
        b3: (outputs,).
        tf32: Permit TF32 on a GPU; for the reference, PyTorch's flags may forbid it.
        backend: "auto", "reference", "native" for float32 and float64 tensors on the CPU, or "triton" for CUDA tensors that
            are not float64. "auto" does not take "triton" until it has been measured on a GPU.

    Returns:
        h (B, outputs, H, W).

    Raises:
        ValueError, TypeError: A wrong shape, dtype or device; the message names the argument.

    Example:
        >>> z1, pre = torch.randn(2, 6, 8, 8), torch.randn(2, 64, 8, 8)
        >>> w1, w2, w3 = torch.randn(64, 6, 3, 3), torch.randn(64, 64, 1, 1), torch.randn(12, 64, 3, 3)
        >>> h = ops.step_network(z1, pre, w1, w2, torch.zeros(64), w3, torch.zeros(12))
        >>> tuple(h.shape)
        (2, 12, 8, 8)
    """
    batch, hidden, height, width = check_image("step_network", "pre", pre)
    if (z1 is None) != (w1 is None):
        raise ValueError("step_network: z1 and w1 must both be given, or both be None")
    if z1 is not None and w1 is not None:
        channels = check_image("step_network", "z1", z1)[1]
        check_tensors("step_network", pre, ("z1", z1, (batch, channels, height, width)), ("w1", w1, (hidden, channels, 3, 3)))
    outputs = w3.shape[0] if isinstance(w3, Tensor) and w3.dim() else 0
    check_tensors(
        "step_network",
        pre,
        ("w2", w2, (hidden, hidden, 1, 1)),
        ("b2", b2, (hidden,)),
        ("w3", w3, (outputs, hidden, 3, 3)),
        ("b3", b3, (outputs,)),
    )
    w2, b2, w3, b3 = (weight.to(pre.dtype) for weight in (w2, b2, w3, b3))
    network = StepNetwork(None if w1 is None else w1.to(pre.dtype), w2, b2, w3, b3)
    return evaluate_network(network, z1, pre, tf32, resolve_backend("step_network", backend, pre))


def evaluate_network(network: StepNetwork, z1: Tensor | None, pre: Tensor, tf32: bool, backend: str) -> Tensor:
    """`step_network` of checked arguments of one dtype; a batch of 1 of pre is shared by all samples of z1."""
    if z1 is not None:
        pre = pre.expand(z1.shape[0], -1, -1, -1)
    return _step_network((z1, pre, *network), tf32, backend)[0]


def network_gradients(
    network: StepNetwork,
    z1: Tensor | None,
    h1: Tensor,
    h2: Tensor,
    dh: Tensor,
    needs_weights: bool,
    method: ConvolutionMethod,
    dpre: Tensor,
) -> tuple[Tensor | None, StepNetwork | None]:
    """Gradients of z1, in the dtype of the network, and with `needs_weights` of the weights; writes that of pre to `dpre`."""
    dh, wanted = dh.to(h2.dtype), (True, needs_weights, needs_weights)
    dh2, dw3, db3 = convolution_backward(dh, h2, network.w3, wanted, method, relu=(h2, 0.0))
    dh1, dw2, db2 = convolution_backward(cast(Tensor, dh2), h1, network.w2, wanted, method)
    torch.ops.aten.threshold_backward.grad_input(dh1, h1, 0, grad_input=dpre)
    dz1, dw1 = None, None
    if z1 is not None and network.w1 is not None:
        dz1, dw1, _ = convolution_backward(dpre, z1.to(h1.dtype), network.w1, (True, needs_weights, False), method)
    others = cast(tuple[Tensor, Tensor, Tensor, Tensor], (dw2, db2, dw3, db3))
    return dz1, StepNetwork(dw1, *others) if needs_weights else None


def _method(tf32: bool, backend: str) -> ConvolutionMethod:
    """The method by which the gradients of a network are convolved."""
    return ConvolutionMethod(tf32, "reference" if backend == "reference" else "auto")


def _forward(tensors: NetworkTensors, tf32: bool, backend: str) -> tuple[tuple[Tensor], Tensors]:
    return (kernels(backend).step_network_forward(*tensors, tf32=tf32),), ()


def _backward(
    grads: tuple[Tensor], tensors: NetworkTensors, _: Tensors, needed: tuple[bool, ...], tf32: bool, backend: str
) -> Tensors:
    z1, network = tensors[0], StepNetwork(*tensors[2:])
    h1, h2 = kernels(backend).step_network_layers(*tensors, tf32=tf32)[:2]
    dpre = torch.empty_like(h1)
    dz1, dnetwork = network_gradients(network, z1, h1, h2, grads[0], any(needed[2:]), _method(tf32, backend), dpre)
    return None if z1 is None or dz1 is None else dz1.to(z1.dtype), dpre, *(dnetwork or (None,) * 5)


def _reference(
    z1: Tensor | None, pre: Tensor, w1: Tensor | None, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, tf32: bool, _: str
) -> tuple[Tensor]:
    method = ConvolutionMethod(tf32, "reference")
    h1 = F.relu(pre if z1 is None or w1 is None else convolution(z1.to(pre.dtype), w1, None, method) + pre)
    h2 = F.relu(convolution(h1, w2, b2, method))
    return (convolution(h2, w3, b3, method),)


def _fake(_: Tensor | None, pre: Tensor, *rest: Tensor) -> tuple[Tensor]:
    shape = pre.shape[0], rest[4].shape[0], *pre.shape[2:]
    return (empty_channels_last(shape, pre),)


_step_network = Operator(
    "step_network",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature(
        "Tensor? z1, Tensor pre, Tensor? w1, Tensor w2, Tensor b2, Tensor w3, Tensor b3",
        "bool tf32, str backend",
        fake=_fake,
        outputs=1,
    ),
    autograd_of_reference=False,
)
