"""Image metrics, and the resize that metrics and training data use."""

from ncsr_fast.metrics.fidelity import TO_8BIT, lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.metrics.perceptual import (
    LPIPSReference,
    LPIPSUnavailable,
    diversity_score,
    error_maps,
    lpips,
    lpips_digest,
    lpips_model,
)

__all__ = [
    "TO_8BIT",
    "LPIPSReference",
    "LPIPSUnavailable",
    "diversity_score",
    "error_maps",
    "imresize",
    "lpips",
    "lpips_digest",
    "lpips_model",
    "lr_psnr",
    "psnr",
    "ssim",
    "to_uint8",
]
