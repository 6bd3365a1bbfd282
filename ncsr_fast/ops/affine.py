"""Affine coupling and injector: channels shifted and scaled (Real NVP, Dinh et al. 2017; SRFlow, Lugmayr et al. 2020)."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.ops.backend import kernels, resolve_backend
from ncsr_fast.ops.contract import check_eps, check_state, check_tensors, pass_through_channels
from ncsr_fast.ops.operator import Operator, Pair, Tensors
from ncsr_fast.ops.reference import affine_forward
from ncsr_fast.ops.registration import Signature


def affine_injector(
    z: Tensor, h: Tensor, eps: float = 1e-4, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Shift and scale every channel: `y = (z + shift) · scale`, or its inverse `y / scale - shift`.

    The map is computed in float32, or in float64 for float64 z. It is differentiable with respect to z and h, and saves only
    these two for the backward pass.

    Args:
        z: State (B, C, H, W).
        h: (B, 2C, H, W), shift and raw scale interleaved: `shift, raw = h[:, 0::2], h[:, 1::2]`,
            `scale = sigmoid(raw + 2) + eps`. In a flow h depends on the condition alone.
        eps: Lower bound of the scale.
        inverse: Apply the inverse map.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        y (B, C, H, W) in the dtype of z, and logdet (B,) = Σ log scale in nats, the negative of it for the inverse.

    Raises:
        ValueError, TypeError: A wrong shape, dtype, device or eps; the message names the argument.

    Example:
        >>> z, h = torch.randn(2, 12, 8, 8), torch.randn(2, 24, 8, 8)
        >>> y, logdet = ops.affine_injector(z, h)
        >>> tuple(y.shape), tuple(logdet.shape)
        ((2, 12, 8, 8), (2,))
    """
    batch, channels, height, width = check_state("affine_injector", "z", z)
    check_tensors("affine_injector", z, ("h", h, (batch, 2 * channels, height, width)))
    check_eps("affine_injector", eps)
    return affine(z, h, 0, eps, inverse, resolve_backend("affine_injector", backend, z))


def affine_coupling(
    z: Tensor, h: Tensor, eps: float = 1e-4, *, inverse: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Shift and scale the second half of the channels: `y1 = z1`, `y2 = (z2 + shift) · scale`, or the inverse map.

    z1, the pass-through channels, is the first C//2 channels. The map is computed in float32, or in float64 for float64 z. It
    is differentiable with respect to z and h, and saves only these two for the backward pass.

    Args:
        z: State (B, C, H, W).
        h: (B, 2(C - C//2), H, W), shift and raw scale interleaved as for `affine_injector`. In a flow h does not
            depend on z2; this function does not check that.
        eps: Lower bound of the scale.
        inverse: Apply the inverse map.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        y (B, C, H, W) in the dtype of z, and logdet (B,) = Σ log scale in nats, the negative of it for the inverse.

    Raises:
        ValueError, TypeError: A wrong shape, dtype, device or eps; the message names the argument.

    Example:
        >>> z, h = torch.randn(2, 12, 8, 8), torch.randn(2, 12, 8, 8)
        >>> y, logdet = ops.affine_coupling(z, h)
        >>> back, negative = ops.affine_coupling(y, h, inverse=True)
        >>> torch.allclose(back, z, atol=1e-4), torch.allclose(negative, -logdet)
        (True, True)
    """
    batch, channels, height, width = check_state("affine_coupling", "z", z)
    pass_through = pass_through_channels(channels)
    check_tensors("affine_coupling", z, ("h", h, (batch, 2 * (channels - pass_through), height, width)))
    check_eps("affine_coupling", eps)
    return affine(z, h, pass_through, eps, inverse, resolve_backend("affine_coupling", backend, z))


def affine(z: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    """`affine_injector` for the channels of z from `pass_through` on; arguments are checked, the backend is resolved."""
    y, logdet = _affine((z, h), pass_through, eps, inverse, backend)
    return y, logdet


def _forward(tensors: Pair, pass_through: int, eps: float, inverse: bool, backend: str) -> tuple[Pair, Tensors]:
    return kernels(backend).affine_forward(*tensors, pass_through, eps, inverse), ()


def _backward(
    grads: Pair, tensors: Pair, _: Tensors, __: object, pass_through: int, eps: float, inverse: bool, backend: str
) -> Pair:
    return kernels(backend).affine_backward(*grads, *tensors, pass_through, eps, inverse)


def _reference(z: Tensor, h: Tensor, pass_through: int, eps: float, inverse: bool, _: str) -> Pair:
    return affine_forward(z, h, pass_through, eps, inverse)


_affine = Operator(
    "affine",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature("Tensor z, Tensor h", "int pass_through, float eps, bool inverse, str backend"),
)
