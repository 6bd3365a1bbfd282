"""Metrics of a flow's samples in training, because the likelihood does not show an inverse that explodes."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.data.low_light import match_brightness
from ncsr_fast.flow.samples import decode_samples, draw
from ncsr_fast.metrics.fidelity import lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.model import NCSR

_EXAMINED = 32  # side of the LR image that is examined step by step


def sample_metrics(
    model: NCSR, hr: Tensor, lr: Tensor, temperature: float, generator: torch.Generator, to_8bit: str = "round"
) -> tuple[dict[str, float], Tensor]:
    """Figures of one sample of an image (1, 3, sH, sW), and the sample (3, sH, sW).

    The figures are psnr, lr_psnr and ssim, of 8 bits by the rule `to_8bit`; the shares of its pixels that are nonfinite, and
    saturated: beyond [0, 1] before they are clipped. Of low-light models, in place of lr_psnr, psnr_at_reference_brightness:
    that of the sample made as bright as hr first (`ncsr_fast.data.match_brightness`).
    """
    padded = model.padded(lr)
    levels = model.conditioned_levels(padded)
    images, _ = decode_samples(levels, draw(levels, padded, 1, temperature, generator), watch=False)
    raw, sr = model.inputs.composed(images[:, 0], lr), model.inputs.shown(images[:, 0], lr)
    seen = to_uint8(sr, to_8bit)
    metrics = {"psnr": float(psnr(seen, hr))}
    if model.flow.prior == "encoder":
        metrics["psnr_at_reference_brightness"] = float(psnr(to_uint8(match_brightness(raw, hr), to_8bit), hr))
    else:
        metrics["lr_psnr"] = float(lr_psnr(seen, lr, model.config.scale))
    metrics["ssim"] = float(ssim(seen, hr))
    finite = raw.isfinite()
    metrics["nonfinite"] = float((~finite).double().mean())
    metrics["saturated"] = float((finite & ((raw < 0) | (raw > 1))).double().mean())
    return metrics, sr[0]


def health(model: NCSR, lr: Tensor, temperature: float, generator: torch.Generator) -> dict[str, float]:
    """For the top left of an LR image, the smallest divisor of decoding, and the round-trip error of a sample."""
    report = model.check_invertibility(lr[..., :_EXAMINED, :_EXAMINED], temperature, generator)
    return {"smallest_scale": report.worst.smallest_scale, "round_trip": report.round_trip}
