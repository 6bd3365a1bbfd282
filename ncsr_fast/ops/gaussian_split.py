"""Split with a conditional Gaussian prior: half of the state leaves the flow as a latent (Glow, SRFlow)."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.ops.backend import kernels, resolve_backend
from ncsr_fast.ops.contract import check_state, check_tensors
from ncsr_fast.ops.operator import Operator, Pair, Tensors
from ncsr_fast.ops.reference import gaussian_split_forward
from ncsr_fast.ops.registration import Signature


def gaussian_split(z: Tensor, h: Tensor, *, inverse: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Whiten the last channels by a conditional Gaussian: `y = (z1, eps)` with `eps = (z2 - mean) / exp(logs)`, or the inverse.

    The map is computed in float32, or in float64 for float64 z. It is differentiable with respect to z and h, and saves only
    these two for the backward pass.

    Args:
        z: (B, C, H, W): z1 is the first C - C_out channels, z2 (for the inverse, eps) the last C_out.
        h: (B, 2·C_out, H, W), `mean, logs = h[:, 0::2], h[:, 1::2]`; in a flow h depends on z1 alone.
        inverse: Apply the inverse map.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        y (B, C, H, W) in the dtype of z, the channels of z1 followed by those of eps, and logdet (B,): the Gaussian
        log-density `Σ log N(z2; mean, exp(logs)²)` in nats, the negative of it for the inverse. The log-density contains
        the change of variables from z2 to eps, so a flow adds nothing else for this latent.

    Raises:
        ValueError, TypeError: A wrong shape, dtype or device; the message names the argument.

    Example:
        >>> z, h = torch.randn(2, 12, 8, 8), torch.zeros(2, 12, 8, 8)  # mean 0 and standard deviation 1 of 6 channels
        >>> y, log_density = ops.gaussian_split(z, h)
        >>> torch.equal(y, z)
        True
    """
    batch, channels, height, width = check_state("gaussian_split", "z", z)
    if not isinstance(h, Tensor) or h.dim() != 4 or h.shape[1] % 2 or not 0 < h.shape[1] // 2 < channels:
        shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"gaussian_split: h must have shape (B, 2·C_out, H, W) with 0 < C_out < {channels}, not {shape}")
    check_tensors("gaussian_split", z, ("h", h, (batch, h.shape[1], height, width)))
    y, logdet = _gaussian_split((z, h), inverse, resolve_backend("gaussian_split", backend, z))
    return y, logdet


def _forward(tensors: Pair, inverse: bool, backend: str) -> tuple[Pair, Tensors]:
    return kernels(backend).gaussian_split_forward(*tensors, inverse), ()


def _backward(grads: Pair, tensors: Pair, _: Tensors, __: object, inverse: bool, backend: str) -> Pair:
    return kernels(backend).gaussian_split_backward(*grads, *tensors, inverse)


def _reference(z: Tensor, h: Tensor, inverse: bool, _: str) -> Pair:
    return gaussian_split_forward(z, h, inverse)


_gaussian_split = Operator(
    "gaussian_split",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature("Tensor z, Tensor h", "bool inverse, str backend"),
)
