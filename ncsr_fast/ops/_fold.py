"""Actnorm and 1×1 convolution folded into one matrix, in float64: done once a call, not at every pixel.

forward  y = mix·x + offset,  mix = weight·diag(exp(logs)),      offset = mix·bias
inverse  x = mix·y + offset,  mix = diag(exp(-logs))·weight⁻¹,   offset = -bias
the log-det of a pixel is ±(Σ logs + log|det weight|)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.layout import is_wrapped, traced
from ncsr_fast.ops._contract import check_weight
from ncsr_fast.ops._operator import LIBRARY


def fold(
    op: str, bias: Tensor, logs: Tensor, weight: Tensor, inverse: bool, dtype: torch.dtype, with_logdet: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """mix (C, C) and offset (C,) in `dtype`, and the log-det of a pixel in float64, of no meaning without `with_logdet`.

    ValueError when the inverse is wanted and weight has none.
    """
    bias, logs, weight = bias.double(), logs.double(), weight.double()
    logdet = logs.sum() + (torch.linalg.slogdet(weight)[1] if with_logdet else 0)
    if inverse:
        mix, offset = torch.exp(-logs)[:, None] * inverse_weight(op, weight), -bias
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
    turned = torch.linalg.inv_ex(weight)[0].T  # weight⁻ᵀ, the gradient of log|det weight|
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


def inverse_weight(op: str, weight: Tensor) -> Tensor:
    """weight⁻¹ of a float64 matrix; ValueError when it is singular to rounding. Differentiable."""
    if not torch.compiler.is_compiling() and is_wrapped(weight):  # by torch.func, which has no values to check
        unchecked: Tensor = torch.linalg.inv_ex(weight)[0]
        return unchecked
    if traced():
        compiled: Tensor = torch.ops.ncsr_fast.inverse_weight(op, weight)
        return compiled
    return _checked_inverse(op, weight)


def _checked_inverse(op: str, weight: Tensor) -> Tensor:
    result: Tensor = torch.linalg.inv_ex(weight)[0]
    condition = torch.linalg.matrix_norm(weight, torch.inf) * torch.linalg.matrix_norm(result, torch.inf)
    check_weight(op, condition.item(), weight.shape[-1])
    return result


# The check reads a value, which a compiled graph cannot: there it is one opaque operator.
LIBRARY.define("inverse_weight(str op, Tensor weight) -> Tensor")
# LAPACK's inverse is column-major, a GPU's is not: the operator's is row-major, as compiled graphs are told.
LIBRARY.impl("inverse_weight", lambda op, weight: _checked_inverse(op, weight).contiguous(), "CompositeExplicitAutograd")
torch.library.register_fake("ncsr_fast::inverse_weight", lambda op, weight: weight.new_empty(weight.shape), lib=LIBRARY)
torch.library.register_autograd(
    "ncsr_fast::inverse_weight",
    lambda ctx, grad: (None, -ctx.saved_tensors[0].T @ grad @ ctx.saved_tensors[0].T),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    lib=LIBRARY,
)
