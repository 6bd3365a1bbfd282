"""Metrics of a flow's samples in training, because the likelihood does not show an inverse that explodes."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ncsr_fast.flow.samples import decode_samples, draw
from ncsr_fast.metrics.fidelity import lr_psnr, psnr, ssim
from ncsr_fast.model import NCSR

_EXAMINED = 32  # side of the LR image that is examined step by step


def sample_metrics(
    model: NCSR, hr: Tensor, lr: Tensor, temperature: float, generator: torch.Generator
) -> tuple[dict[str, float], Tensor]:
    """Metrics of one sample of an image (1, 3, H, W), and the sample (3, sH, sW).

    The metrics are psnr, lr_psnr and, with scikit-image, ssim; and the shares of pixels that are nonfinite, or saturated, which
    means beyond [0, 1] before they are clipped.
    """
    padded = model.padded(lr)
    levels = model.conditioned_levels(padded)
    images, _ = decode_samples(levels, draw(levels, padded, 1, temperature, generator), watch=False)
    raw, sr = images[:, 0, :, : hr.shape[2], : hr.shape[3]], model.inputs.shown(images[:, 0], lr)
    metrics = {"psnr": float(psnr(sr, hr)), "lr_psnr": float(lr_psnr(sr, lr, model.config.scale))}
    if importlib.util.find_spec("skimage"):
        metrics["ssim"] = float(ssim(sr, hr))
    finite = raw.isfinite()
    metrics["nonfinite"] = float((~finite).double().mean())
    metrics["saturated"] = float((finite & ((raw < 0) | (raw > 1))).double().mean())
    return metrics, sr[0]


def health(model: NCSR, lr: Tensor, temperature: float, generator: torch.Generator) -> dict[str, float]:
    """For the top left of an LR image, the smallest divisor of decoding, and the round-trip error of a sample."""
    report = model.check_invertibility(lr[..., :_EXAMINED, :_EXAMINED], temperature, generator)
    return {"smallest_scale": report.worst.smallest_scale, "round_trip": report.round_trip}
