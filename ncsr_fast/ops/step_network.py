"""The network of an injector or a coupling: three convolutions 3×3 → 1×1 → 3×3, in one or two kernels of a backend.

    h1 = relu(w1 ∗ z1 + pre),   h2 = relu(w2 · h1 + b2),   h = w3 ∗ h2 + b3

`pre` is the pre-activation of the first layer: the part that depends on the condition alone, plus the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.layout import empty_channels_last, readable
from ncsr_fast.ops.backend import COVERAGE, kernels, resolve_backend
from ncsr_fast.ops.contract import check_image, check_tensors
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution
from ncsr_fast.ops.network_gradients import NetworkPass
from ncsr_fast.ops.network_gradients import StepNetwork as StepNetwork
from ncsr_fast.ops.operator import Operator, Tensors
from ncsr_fast.ops.registration import Signature

Hidden = tuple[Tensor, Tensor]  # h1 and h2
Layers = tuple[Tensor, Tensor, Tensor]  # h1, h2 and h
NetworkTensors = tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]  # z1, pre and the weights


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


def packs_weights(backend: str) -> bool:
    """True for a backend that reads the weights of networks otherwise than they are."""
    return "step_network_weights" in COVERAGE.get(backend, {})


def network_weights(w1: Tensor | None, w2: Tensor, w3: Tensor, backend: str, transposed: bool = False) -> tuple[Tensor, ...]:
    """The weights of K networks, stacked, as a backend reads them best: tensors (K, …), for `packed` of its functions.

    Nothing where operators are recorded, or where the backend reads the weights as they are. Autograd does not see it.

    Args:
        w1: (K, hidden, C, 3, 3) or None.
        w2: (K, hidden, hidden, 1, 1).
        w3: (K, outputs, hidden, 3, 3).
        backend: Resolved.
        transposed: For its backward function.
    """
    if not packs_weights(backend) or not readable((w2, w3), by_pytorch=True):
        return ()
    weights = (None if w1 is None else w1.detach(), w2.detach(), w3.detach())
    return kernels(backend).step_network_weights(*weights, w2.dtype, transposed)


def _forward(tensors: NetworkTensors, tf32: bool, backend: str) -> tuple[tuple[Tensor], Tensors]:
    return (kernels(backend).step_network_forward(*tensors, tf32=tf32),), ()


def _backward(
    grads: tuple[Tensor], tensors: NetworkTensors, _: Tensors, needed: tuple[bool, ...], tf32: bool, backend: str
) -> Tensors:
    (z1, pre, *weights), functions = tensors, kernels(backend)
    network = StepNetwork._make(weights)
    dh, dpre = grads[0].to(pre.dtype), empty_channels_last(pre.shape, pre)
    dz1 = None if z1 is None else torch.zeros_like(z1)
    (own,) = functions.step_network_backward([dh], [z1], [pre], None, [network], [dpre], [dz1], tf32=tf32)
    if not any(needed[2:]):
        return dz1, dpre, *(None,) * 5
    gradient = StepNetwork._make(None if weight is None else torch.empty_like(weight) for weight in network)
    own_pass = NetworkPass(z1, pre, own.h1, own.h2, dpre, own.dh2, dh, own.sums)
    functions.step_network_weights_backward([own_pass], [gradient], tf32=tf32)
    return dz1, dpre, *gradient


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
