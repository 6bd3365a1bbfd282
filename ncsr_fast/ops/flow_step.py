"""What lies between two coupling networks of a flow, fused: coupling, actnorm, 1×1 convolution, injector."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ncsr_fast.ops import _fold
from ncsr_fast.ops._backends import implementation, resolve_backend
from ncsr_fast.ops._contract import check_eps, check_state, check_tensors, compute_dtype
from ncsr_fast.ops._operator import Operator
from ncsr_fast.ops.affine_injector import affine
from ncsr_fast.ops.inverse_logdet import invert
from ncsr_fast.precision import product


def flow_step(
    z: Tensor,
    h_coupling: Tensor | None,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    h_injector: Tensor | None,
    eps: float = 1e-4,
    *,
    inverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The coupling of one step, then actnorm, 1×1 convolution and injector of the next; or the inverse of all that.

    z           (B, C, H, W)
    h_coupling  (B, 2(C - C//2), H, W) as for `affine_coupling`, or None: no coupling
    bias, logs  (C,), weight (C, C) as for `actnorm_invconv`
    h_injector  (B, 2C, H, W) as for `affine_injector`, or None: no injector
    returns     y (B, C, H, W) in the dtype of z, and logdet (B,), the sum of the parts'

    Equal to `affine_coupling`, `actnorm_invconv` and `affine_injector` one after the other (the inverses in the opposite
    order), which all touch one pixel at a time and can share one pass over memory. Computed in float32, or in float64
    for float64 z; the inverse of `weight` always in float64. Differentiable with respect to every tensor: z, y and the
    arguments are saved, what is between is recomputed. Raises ValueError when `inverse` meets a weight that is singular
    or not finite, and ValueError or TypeError naming the argument for a wrong shape, dtype, device or eps.
    """
    batch, channels, height, width = check_state("flow_step", "z", z)
    check_tensors("flow_step", z, *parameters(channels, bias, logs, weight))
    if h_coupling is not None:
        check_tensors("flow_step", z, ("h_coupling", h_coupling, (batch, 2 * (channels - channels // 2), height, width)))
    if h_injector is not None:
        check_tensors("flow_step", z, ("h_injector", h_injector, (batch, 2 * channels, height, width)))
    check_eps("flow_step", eps)
    backend = resolve_backend("flow_step", backend, z)
    return step("flow_step", z, h_coupling, bias, logs, weight, h_injector, eps, inverse, backend)


def parameters(channels: int, bias: Tensor, logs: Tensor, weight: Tensor) -> tuple[tuple[str, Tensor, tuple[int, ...]], ...]:
    """What `check_tensors` is to know of an actnorm and a 1×1 convolution."""
    return ("bias", bias, (channels,)), ("logs", logs, (channels,)), ("weight", weight, (channels, channels))


def step(
    op: str,
    z: Tensor,
    h_coupling: Tensor | None,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    h_injector: Tensor | None,
    eps: float,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`flow_step` of checked arguments; `op` is who is named when the weight is singular."""
    return _flow_step(z, h_coupling, bias, logs, weight, h_injector, eps, inverse, op, backend)


def _reference(
    z: Tensor,
    h_coupling: Tensor | None,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    h_injector: Tensor | None,
    eps: float,
    inverse: bool,
    op: str,
    _: str,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(z)
    y, kept = z.to(dtype), z.shape[1] // 2
    affines = [(h_coupling, kept), (h_injector, 0)]
    before, after = affines[::-1] if inverse else affines
    logdets = []
    if before[0] is not None:
        y, logdet = affine(y, before[0], before[1], eps, inverse, "reference")
        logdets.append(logdet)
    y, logdet = _mix(op, y, bias.to(dtype), logs.to(dtype), weight.to(dtype), inverse)
    logdets.append(logdet)
    if after[0] is not None:
        y, logdet = affine(y, after[0], after[1], eps, inverse, "reference")
        logdets.append(logdet)
    return y.to(z.dtype), torch.stack(logdets).sum(dim=0)


def _mix(op: str, x: Tensor, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Actnorm and 1×1 convolution as the definition has them."""
    batch, _, height, width = x.shape
    inverses, logdets = invert(weight[None], op, needs_inverse=inverse, backend="reference")
    logdet = (logs.sum() + logdets[0].to(logs.dtype)) * (height * width)
    pixels = x.flatten(2)
    if inverse:
        mixed = inverses[0].to(weight.dtype)
        y, logdet = torch.exp(-logs)[:, None] * (product(mixed, pixels)) - bias[:, None], -logdet
    else:
        y = product(weight, (pixels + bias[:, None]) * torch.exp(logs)[:, None])
    return y.view(x.shape), logdet.expand(batch)


def _forward(
    z: Tensor,
    h_coupling: Tensor | None,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    h_injector: Tensor | None,
    eps: float,
    inverse: bool,
    op: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = implementation(backend)
    mix, offset, of_pixel = _folding(kernels, z).fold(op, bias, logs, weight, inverse, compute_dtype(z))
    before, after = (h_injector, h_coupling) if inverse else (h_coupling, h_injector)
    y, logdet = kernels.step_fwd(z, mix, offset, before, after, eps, inverse)
    return y, logdet.add_(of_pixel * (z.shape[2] * z.shape[3]))


def _backward(
    dy: Tensor,
    dlogdet: Tensor,
    y: Tensor,
    z: Tensor,
    h_coupling: Tensor | None,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    h_injector: Tensor | None,
    eps: float,
    inverse: bool,
    op: str,
    backend: str,
) -> tuple[Tensor | None, ...]:
    kernels = implementation(backend)
    folding = _folding(kernels, z)
    mix, _, _ = folding.fold(op, bias, logs, weight, inverse, compute_dtype(z), with_logdet=False)
    before, after = (h_injector, h_coupling) if inverse else (h_coupling, h_injector)
    dz, dmix, doffset, dbefore, dafter = kernels.step_bwd(dy, dlogdet, z, y, mix, before, after, eps, inverse)
    of_pixels = dlogdet.sum(dtype=torch.float64) * (z.shape[2] * z.shape[3])
    dbias, dlogs, dweight = folding.fold_backward(bias, logs, weight, inverse, dmix, doffset, of_pixels)
    dcoupling, dinjector = (dafter, dbefore) if inverse else (dbefore, dafter)
    return dz, dcoupling, dbias, dlogs, dweight, dinjector


def _folding(kernels: ModuleType, z: Tensor) -> ModuleType:
    """Who folds the parameters: the backend where it can (C++ on the CPU), else torch, on the device of z."""
    return kernels if z.device.type == "cpu" and hasattr(kernels, "fold") else _fold


_flow_step = Operator(
    "flow_step",
    "Tensor z, Tensor? h_coupling, Tensor bias, Tensor logs, Tensor weight, Tensor? h_injector",
    "float eps, bool inverse, str op, str backend",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    keeps_output=True,
)
