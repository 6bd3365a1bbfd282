"""The maps of the fast backends in plain PyTorch: what the engine runs where there is no kernel, and what gradients of
gradients are taken of.

    affine   y = (x + t)·s on the channels from `kept` on, or its inverse y = x/s - t; s = sigmoid(raw + 2) + eps
    step     y = post(mix·pre(x) + offset), with two such affines
    inverse_logdet   W⁻¹, log|det W| and the condition number of W
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.layout import is_channels_last
from ncsr_fast.ops._contract import compute_dtype
from ncsr_fast.precision import product


def affine_fwd(x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and Σ log|det| (B,)."""
    dtype = compute_dtype(x)
    h = h.to(dtype)
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2) + eps
    logdet = torch.log(scale).sum(dim=(1, 2, 3))
    changed = x[:, kept:].to(dtype)
    y = changed / scale - shift if inverse else (changed + shift) * scale
    y = torch.cat([x[:, :kept], y.to(x.dtype)], dim=1) if kept else y.to(x.dtype)
    return y, -logdet if inverse else logdet


def affine_bwd(
    dy: Tensor, dlogdet: Tensor, x: Tensor, h: Tensor, kept: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and h, from the input x."""
    return _affine_gradients(dy, dlogdet, affine_fwd(x, h, kept, eps, inverse)[0], h, kept, eps, inverse)


def _affine_gradients(
    dy: Tensor, dlogdet: Tensor, y: Tensor, h: Tensor, kept: int, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """From the output y: dx = dy·s and ds = (dy·y + g)/s, or for the inverse dx = dy/s and ds = -(dx·(y + t) + g/s)."""
    dtype = compute_dtype(y)
    values = h.to(dtype)
    gate, g = torch.sigmoid(values[:, 1::2] + 2), dlogdet[:, None, None, None]
    scale = gate + eps
    changed, dchanged = y[:, kept:].to(dtype), dy[:, kept:].to(dtype)
    if inverse:
        dchanged = dchanged / scale
        dshift, dscale = -dy[:, kept:].to(dtype), -(dchanged * (changed + values[:, 0::2]) + g / scale)
    else:
        dscale = (dchanged * changed + g) / scale
        dchanged = dchanged * scale
        dshift = dchanged
    dh = torch.stack([dshift, dscale * gate * (1 - gate)], dim=2).flatten(1, 2)
    dx = torch.cat([dy[:, :kept], dchanged.to(dy.dtype)], dim=1) if kept else dchanged.to(dy.dtype)
    return dx, dh.to(h.dtype)


def step_fwd(
    x: Tensor, mix: Tensor, offset: Tensor, h_pre: Tensor | None, h_post: Tensor | None, eps: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and the log|det| (B,) of the affines. Encoding, `pre` is a coupling; decoding, `post` is one."""
    kept_pre, kept_post = _kept(x, inverse)
    y, logdet = x.to(mix.dtype), x.new_zeros(x.shape[0], dtype=compute_dtype(x))
    if h_pre is not None:
        y, part = affine_fwd(y, h_pre, kept_pre, eps, inverse)
        logdet = logdet + part
    y = mixed(mix, y) + offset[:, None, None]
    if h_post is not None:
        y, part = affine_fwd(y, h_post, kept_post, eps, inverse)
        logdet = logdet + part
    return y.to(x.dtype), logdet


def step_bwd(
    dy: Tensor,
    dlogdet: Tensor,
    x: Tensor,
    y: Tensor,
    mix: Tensor,
    h_pre: Tensor | None,
    h_post: Tensor | None,
    eps: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, mix, offset, h_pre and h_post, from the input x and the output y."""
    kept_pre, kept_post = _kept(x, inverse)
    dh_pre = dh_post = None
    dw = dy.to(mix.dtype)
    if h_post is not None:
        dw, dh_post = _affine_gradients(dw, dlogdet, y.to(mix.dtype), h_post, kept_post, eps, inverse)
    a = x.to(mix.dtype)
    if h_pre is not None:
        a, _ = affine_fwd(a, h_pre, kept_pre, eps, inverse)
    pixels = dw.flatten(2)
    dmix, doffset = product(pixels, a.flatten(2).mT).sum(dim=0), pixels.sum(dim=(0, 2))
    dx = mixed(mix.mT, dw)
    if h_pre is not None:
        dx, dh_pre = _affine_gradients(dx, dlogdet, a, h_pre, kept_pre, eps, inverse)
    return dx.to(x.dtype), dmix, doffset, dh_pre, dh_post


def mixed(mix: Tensor, x: Tensor) -> Tensor:
    """mix·x at every pixel of x (B, C, H, W), in the layout of x."""
    if is_channels_last(x):
        return product(x.movedim(1, 3), mix.mT).movedim(3, 1)
    return product(mix, x.flatten(2)).view(x.shape)


def _kept(x: Tensor, inverse: bool) -> tuple[int, int]:
    """Channels left alone by the affine before the matrix and by the one after it."""
    half = x.shape[1] // 2
    return (0, half) if inverse else (half, 0)


def inverse_logdet(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W⁻¹ (N, C, C), log|det W| (N,) and the condition number ‖W‖·‖W⁻¹‖ (N,) in the ∞-norm, by PyTorch's LU."""
    inverse, info = torch.linalg.inv_ex(weight)
    condition = torch.linalg.matrix_norm(weight, torch.inf) * torch.linalg.matrix_norm(inverse, torch.inf)
    condition = torch.where(info == 0, condition, torch.inf)  # the inverse of a singular matrix may be anything
    return inverse.contiguous(), torch.linalg.slogdet(weight)[1], condition.detach()  # LAPACK's inverse is column-major
