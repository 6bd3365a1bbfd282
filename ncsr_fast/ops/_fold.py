"""Actnorm and 1×1 convolution folded into one matrix, in float64: done once a call, not at every pixel.

forward  y = mix·x + offset,  mix = weight·diag(exp(logs)),      offset = mix·bias
inverse  x = mix·y + offset,  mix = diag(exp(-logs))·weight⁻¹,   offset = -bias
the log-det of a pixel is ±(Σ logs + log|det weight|)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.ops.inverse_logdet import invert


def fold(
    op: str, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dtype: torch.dtype, with_logdet: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """mix (C, C) and offset (C,) in `dtype`, and the log-det of a pixel in float64, of no meaning without `with_logdet`.

    ValueError where the inverse is wanted, weight has none, and the host may read values.
    """
    bias, logs, weight = bias.double(), logs.double(), weight.double()
    logdet = logs.sum()
    if inverse or with_logdet:
        inverses, logdets = invert(weight[None], op, needs_inverse=inverse)
        logdet = logdet + logdets[0]
    if inverse:
        mix, offset = torch.exp(-logs)[:, None] * inverses[0], -bias
    else:
        mix = weight * torch.exp(logs)
        offset = mix @ bias
    return mix.to(dtype).contiguous(), offset.to(dtype), -logdet if inverse else logdet


def fold_backward(
    bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dmix: Tensor, doffset: Tensor, dlogdet: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of bias, logs and weight; `dlogdet` is the sum over samples and pixels."""
    dtypes = bias.dtype, logs.dtype, weight.dtype
    bias, logs, weight, dmix, doffset = (tensor.double() for tensor in (bias, logs, weight, dmix, doffset))
    turned = invert(weight[None], "", needs_inverse=False)[0][0].T  # weight⁻ᵀ, the gradient of log|det weight|
    if inverse:
        scale = torch.exp(-logs)[:, None]
        dbias = -doffset
        dlogs = -(dmix * scale * turned.T).sum(dim=1) - dlogdet
        dweight = -turned @ (scale * dmix) @ turned - dlogdet * turned
    else:
        mix = weight * torch.exp(logs)
        total = dmix + torch.outer(doffset, bias)  # offset is mix·bias
        dbias = mix.T @ doffset
        dlogs = (total * mix).sum(dim=0) + dlogdet
        dweight = total * torch.exp(logs) + dlogdet * turned
    return dbias.to(dtypes[0]), dlogs.to(dtypes[1]), dweight.to(dtypes[2])
