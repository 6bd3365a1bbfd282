"""The folding of actnorms and scales into convolutions in PyTorch: `ncsr_fast.ops.reference` has these functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncsr_fast.ops.inverse_logdet import invert


def fold_forward(
    name: str,
    bias: Tensor,
    logs: Tensor,
    weight: Tensor,
    inverse: bool,
    dtype: torch.dtype,
    needs_logdet: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Actnorms and 1×1 convolutions as affine maps of a pixel, computed in float64.

        y = mix·x + offset,  mix = weight·diag(exp(logs)),     offset = mix·bias
        x = mix·y + offset,  mix = diag(exp(-logs))·weight⁻¹,  offset = -bias     for the inverse

    Args:
        name: The name that messages give to a matrix without an inverse; {} becomes its number.
        bias: (N, C), or (C,) of a single map.
        logs: (N, C), or (C,) of a single map.
        weight: (N, C, C), or (C, C).
        inverse: Return the inverse maps.
        dtype: Dtype of mix and offset.
        needs_logdet: False: the log-det is not used.

    Returns:
        mix (N, C, C), offset (N, C), and the log-det (N,) of a pixel in float64, ±(Σ logs + log|det weight|); without N for
        a single map.

    Raises:
        ValueError: `inverse` with a weight that has no inverse, if the host may read values.
    """
    single, bias, logs, weight = weight.dim() == 2, bias.double(), logs.double(), weight.double()
    logdet = logs.sum(dim=-1)
    if inverse or needs_logdet:
        undone, logdets = invert(weight[None] if single else weight, name, needs_inverse=inverse)
        undone, logdets = (undone[0], logdets[0]) if single else (undone, logdets)
        logdet = logdet + logdets
    if inverse:
        mix, offset, logdet = torch.exp(-logs)[..., :, None] * undone, -bias, -logdet
    else:
        mix = weight * torch.exp(logs)[..., None, :]
        offset = (mix @ bias[..., None])[..., 0]
    return mix.to(dtype).contiguous(), offset.to(dtype), logdet


def fold_backward(
    bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dmix: Tensor, doffset: Tensor, dlogdet: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of bias, logs and weight of `fold_forward` in their dtypes; dlogdet is (N,), or () for a single map."""
    dtypes, single = (bias.dtype, logs.dtype, weight.dtype), weight.dim() == 2
    bias, logs, weight, dmix, doffset, dlogdet = (t.double() for t in (bias, logs, weight, dmix, doffset, dlogdet))
    undone = invert(weight[None] if single else weight, "", needs_inverse=False)[0]
    turned = (undone[0] if single else undone).mT  # weight⁻ᵀ, the gradient of log|det weight|
    g = dlogdet[..., None, None]
    if inverse:
        scaled = torch.exp(-logs)[..., :, None] * dmix
        dbias, dlogs = -doffset, -(scaled * turned.mT).sum(dim=-1) - dlogdet[..., None]
        dweight = -turned @ scaled @ turned - g * turned
    else:
        scale = torch.exp(logs)[..., None, :]
        mix = weight * scale
        total = dmix + doffset[..., :, None] * bias[..., None, :]  # offset is mix·bias
        dbias, dlogs = (mix.mT @ doffset[..., None])[..., 0], (total * mix).sum(dim=-2) + dlogdet[..., None]
        dweight = total * scale + g * turned
    return dbias.to(dtypes[0]), dlogs.to(dtypes[1]), dweight.to(dtypes[2])


def fold_filters_forward(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    logs: Sequence[Tensor],
    factors: Sequence[float],
    first: Sequence[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights and biases of stacks of convolutions times the scales exp(factor · logs) of their outputs, in `dtype`, dense.

    Args:
        weights: (K, outputs, inputs, k, k) of each stack.
        biases: (K, outputs).
        logs: (K, outputs).
        factors: Of each stack one.
        first: Of each stack, the inputs whose weights become a tensor of their own.
        dtype: Of the results.

    Returns:
        The weights of the first inputs, those of the others, and the biases, of each stack one.
    """
    folded: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for weight, bias, own_logs, factor, count in zip(weights, biases, logs, factors, first):
        scale = torch.exp(factor * own_logs)
        parts = (weight * scale[..., None, None, None]).to(dtype).tensor_split([count], dim=2)
        for into, part in zip(folded, (*parts, (bias * scale).to(dtype))):
            into.append(part.contiguous())
    return folded


def fold_filters_backward(
    dfirst: Sequence[Tensor],
    drest: Sequence[Tensor],
    dfolded: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    logs: Sequence[Tensor],
    factors: Sequence[float],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of weights, biases and logs from those of the three results of `fold_filters_forward`."""
    gradients: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for first, rest, dbias, weight, bias, own_logs, factor in zip(dfirst, drest, dfolded, weights, biases, logs, factors):
        scale, dweight = torch.exp(factor * own_logs), torch.cat([first, rest], dim=2).to(weight.dtype)
        dbias = dbias.to(bias.dtype)
        dscale = (dweight * weight).sum(dim=(2, 3, 4)) + dbias * bias
        for into, part in zip(gradients, (dweight * scale[..., None, None, None], dbias * scale, factor * scale * dscale)):
            into.append(part)
    return gradients
