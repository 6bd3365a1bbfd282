"""The maps between two coupling networks of a flow, fused: coupling, actnorm, 1×1 convolution, injector."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.ops.affine import affine
from ncsr_fast.ops.backend import covering_backend, kernels, resolve_backend
from ncsr_fast.ops.contract import check_eps, check_state, check_tensors, compute_dtype, pass_through_channels
from ncsr_fast.ops.inverse_logdet import invert
from ncsr_fast.ops.operator import Operator, Pair, Tensors
from ncsr_fast.ops.protocol import Kernels
from ncsr_fast.ops.reference import flow_step_forward
from ncsr_fast.ops.registration import Signature
from ncsr_fast.precision import product

StepTensors = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]
FoldedTensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


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
    """Apply the coupling of one step, then actnorm, 1×1 convolution and injector of the next step; or the inverse of all.

    The result equals `affine_coupling`, `actnorm_invconv` and `affine_injector` one after the other (for the inverse, their
    inverses in the opposite order). All of them act on one pixel at a time and share one pass over memory here. The map is
    computed in float32, or in float64 for float64 z; the inverse of `weight` always in float64. It is differentiable with
    respect to every tensor: z, y and the arguments are saved, and the values in between are recomputed.

    Args:
        z: State (B, C, H, W).
        h_coupling: (B, 2(C - C//2), H, W) as for `affine_coupling`, or None: no coupling.
        bias: (C,) as for `actnorm_invconv`, as are `logs` (C,) and `weight` (C, C).
        logs: (C,).
        weight: (C, C).
        h_injector: (B, 2C, H, W) as for `affine_injector`, or None: no injector.
        eps: Lower bound of the scales.
        inverse: Apply the inverse map.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        y (B, C, H, W) in the dtype of z, and logdet (B,), the sum of the log-dets of the parts, in nats.

    Raises:
        ValueError: `inverse` with a weight that is singular or not finite (on the CPU).
        ValueError, TypeError: A wrong shape, dtype, device or eps; the message names the argument.

    Example:
        >>> bias, logs, weight = torch.zeros(12), torch.zeros(12), torch.eye(12)
        >>> z, h_coupling, h_injector = torch.randn(2, 12, 8, 8), torch.randn(2, 12, 8, 8), torch.randn(2, 24, 8, 8)
        >>> y, logdet = ops.flow_step(z, h_coupling, bias, logs, weight, h_injector)
    """
    batch, channels, height, width = check_state("flow_step", "z", z)
    check_tensors("flow_step", z, *parameters(channels, bias, logs, weight))
    if h_coupling is not None:
        changed = channels - pass_through_channels(channels)
        check_tensors("flow_step", z, ("h_coupling", h_coupling, (batch, 2 * changed, height, width)))
    if h_injector is not None:
        check_tensors("flow_step", z, ("h_injector", h_injector, (batch, 2 * channels, height, width)))
    check_eps("flow_step", eps)
    backend = resolve_backend("flow_step", backend, z)
    return step("flow_step", z, h_coupling, bias, logs, weight, h_injector, eps, inverse, backend)


def parameters(channels: int, bias: Tensor, logs: Tensor, weight: Tensor) -> tuple[tuple[str, Tensor, tuple[int, ...]], ...]:
    """Names, tensors and expected shapes of an actnorm and a 1×1 convolution, for `check_tensors`."""
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
    """`flow_step` of checked arguments; messages about a singular weight name `op`."""
    y, logdet = _flow_step((z, h_coupling, bias, logs, weight, h_injector), eps, inverse, op, backend)
    return y, logdet


def folded_step(
    x: Tensor,
    mix: Tensor,
    offset: Tensor,
    h_before: Tensor | None,
    h_after: Tensor | None,
    eps: float,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`after(mix · before(x) + offset)` and the log|det| (B,) of the two affines: a flow step with folded parameters.

    Args:
        x: State (B, C, H, W).
        mix: (C, C), from `fold` for the direction of `inverse`.
        offset: (C,), from `fold` for the direction of `inverse`.
        h_before: Network output for the affine before the matrix, or None: of a coupling in encoding, of an injector in
            decoding.
        h_after: Network output for the affine after the matrix, or None: of an injector in encoding, of a coupling in decoding.
        eps: Lower bound of the scales.
        inverse: Both affines are inverse maps.
        backend: Resolved backend.
    """
    y, logdet = _folded_step((x, mix, offset, h_before, h_after), eps, inverse, backend)
    return y, logdet


def _forward(tensors: StepTensors, eps: float, inverse: bool, op: str, backend: str) -> tuple[Pair, Tensors]:
    z, h_coupling, bias, logs, weight, h_injector = tensors
    mix, offset, logdet_of_pixel = _folding(backend, z).fold_forward(op, bias, logs, weight, inverse, compute_dtype(z))
    before, after = (h_injector, h_coupling) if inverse else (h_coupling, h_injector)
    y, logdet = kernels(backend).flow_step_forward(z, mix, offset, before, after, eps, inverse)
    return (y, logdet.add_(logdet_of_pixel, alpha=z.shape[2] * z.shape[3])), (y,)


def _backward(
    grads: Pair, tensors: StepTensors, saved: tuple[Tensor], _: object, eps: float, inverse: bool, op: str, backend: str
) -> Tensors:
    z, h_coupling, bias, logs, weight, h_injector = tensors
    (dy, dlogdet), folding = grads, _folding(backend, z)
    mix, _, _ = folding.fold_forward(op, bias, logs, weight, inverse, compute_dtype(z), needs_logdet=False)
    before, after = (h_injector, h_coupling) if inverse else (h_coupling, h_injector)
    found = kernels(backend).flow_step_backward(dy, dlogdet, z, *saved, mix, before, after, eps, inverse)
    dz, dmix, doffset, dbefore, dafter = found
    assert dmix is not None and doffset is not None
    dlogdet_of_pixel = dlogdet.sum(dtype=torch.float64) * (z.shape[2] * z.shape[3])
    dbias, dlogs, dweight = folding.fold_backward(bias, logs, weight, inverse, dmix, doffset, dlogdet_of_pixel)
    dcoupling, dinjector = (dafter, dbefore) if inverse else (dbefore, dafter)
    return dz, dcoupling, dbias, dlogs, dweight, dinjector


def _folding(backend: str, z: Tensor) -> Kernels:
    """The backend that folds the parameters on the device of z: the step's own if it can, else the reference."""
    return kernels(covering_backend("fold", backend, z))


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
) -> Pair:
    dtype = compute_dtype(z)
    y, pass_through = z.to(dtype), pass_through_channels(z.shape[1])
    affines = [(h_coupling, pass_through), (h_injector, 0)]
    (h_before, pass_before), (h_after, pass_after) = affines[::-1] if inverse else affines
    logdets = []
    if h_before is not None:
        y, logdet = affine(y, h_before, pass_before, eps, inverse, "reference")
        logdets.append(logdet)
    y, logdet = _mixed(op, y, bias.to(dtype), logs.to(dtype), weight.to(dtype), inverse)
    logdets.append(logdet)
    if h_after is not None:
        y, logdet = affine(y, h_after, pass_after, eps, inverse, "reference")
        logdets.append(logdet)
    return y.to(z.dtype), torch.stack(logdets).sum(dim=0)


def _mixed(op: str, x: Tensor, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool) -> Pair:
    """Actnorm and 1×1 convolution by their formulas, or their inverse, with the log-det (B,)."""
    batch, _, height, width = x.shape
    inverses, logdets = invert(weight[None], op, needs_inverse=inverse, backend="reference")
    logdet = (logs.sum() + logdets[0].to(logs.dtype)) * (height * width)
    pixels = x.flatten(2)
    if inverse:
        undone = inverses[0].to(weight.dtype)
        y, logdet = torch.exp(-logs)[:, None] * product(undone, pixels) - bias[:, None], -logdet
    else:
        y = product(weight, (pixels + bias[:, None]) * torch.exp(logs)[:, None])
    return y.view(x.shape), logdet.expand(batch)


_flow_step = Operator(
    "flow_step",
    forward=_forward,
    backward=_backward,
    reference=_reference,
    signature=Signature(
        "Tensor z, Tensor? h_coupling, Tensor bias, Tensor logs, Tensor weight, Tensor? h_injector",
        "float eps, bool inverse, str op, str backend",
        saved=(0,),
    ),
)


def _folded_forward(tensors: FoldedTensors, eps: float, inverse: bool, backend: str) -> tuple[Pair, Tensors]:
    y, logdet = kernels(backend).flow_step_forward(*tensors, eps, inverse)
    return (y, logdet), (y,)


def _folded_backward(
    grads: Pair, tensors: FoldedTensors, saved: tuple[Tensor], _: object, eps: float, inverse: bool, backend: str
) -> Tensors:
    x, mix, _, h_before, h_after = tensors
    return kernels(backend).flow_step_backward(*grads, x, *saved, mix, h_before, h_after, eps, inverse)


def _folded_reference(
    x: Tensor, mix: Tensor, offset: Tensor, h_before: Tensor | None, h_after: Tensor | None, eps: float, inverse: bool, _: str
) -> Pair:
    return flow_step_forward(x, mix, offset, h_before, h_after, eps, inverse)


_folded_step = Operator(
    "folded_step",
    forward=_folded_forward,
    backward=_folded_backward,
    reference=_folded_reference,
    signature=Signature(
        "Tensor x, Tensor mix, Tensor offset, Tensor? h_before, Tensor? h_after",
        "float eps, bool inverse, str backend",
        saved=(0,),
    ),
)
