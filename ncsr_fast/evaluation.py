"""Measuring a model on photographs: fidelity, consistency with the LR image, and diversity of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.data.perturb import degrade
from ncsr_fast.metrics.fidelity import lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.metrics.perceptual import diversity_score, error_maps, lpips
from ncsr_fast.nn.ncsr import NCSR


@dataclass
class Scores:
    """Means over images of one method. `lr_psnr_worst` is the smallest of an image's samples, meaned over images."""

    method: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)

    def means(self) -> dict[str, float]:
        return {key: sum(values) / len(values) for key, values in self.values.items()}


@torch.no_grad()
def timed_samples(model: NCSR, lr: Tensor, n: int, temperature: float, seed: int) -> tuple[Tensor, float]:
    """n samples (n, 3, sH, sW) in [0, 1] of one uint8 LR image (3, H, W), and the seconds each of them took."""
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    started = time.perf_counter()
    samples = model.sample(to_float(lr)[None].to(like), n, temperature, generator)[0]
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return samples, (time.perf_counter() - started) / n


def evaluate(
    model: NCSR,
    images: Iterable[Tensor],
    temperatures: Iterable[float],
    n: int = 10,
    seed: int = 0,
    lpips_network: Any = None,
    lr_images: Iterable[Tensor] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Scores]:
    """Scores of bicubic enlargement and of `model` at each temperature (one sample at temperature 0, else n).

    images         uint8 (3, H, W), sides multiples of the scale; lr_images their LR images, None for MATLAB bicubic
    lpips_network  from `metrics.lpips_model`, None to leave LPIPS out
    returns        one Scores a method: psnr, ssim, lr_psnr, lr_psnr_worst, diversity (`diversity_score` of
                   `error_maps`), seconds (per sample); with LPIPS also lpips and lpips_diversity, the
                   challenge's score. All per image, every sample counted alike.
    """
    device = next(model.parameters()).device
    scale = model.config.scale
    methods = {temperature: Scores(f"temperature {temperature:g}") for temperature in temperatures}
    bicubic = Scores("bicubic")
    given = iter(lr_images) if lr_images is not None else None
    for number, image in enumerate(images):
        hr = image.to(device)
        lr = degrade(hr, scale) if given is None else next(given).to(device)
        _add(bicubic, imresize(lr, scale)[None], hr, lr, scale, lpips_network)
        for temperature, scores in methods.items():
            samples, seconds = timed_samples(model, lr, n if temperature > 0 else 1, temperature, seed)
            scores.add(seconds=seconds)
            _add(scores, to_uint8(samples), hr, lr, scale, lpips_network)
        progress(
            f"image {number}: " + ", ".join(f"{s.method} {s.values['psnr'][-1]:.2f} dB" for s in (bicubic, *methods.values()))
        )
    return [bicubic, *methods.values()]


def _add(scores: Scores, samples: Tensor, hr: Tensor, lr: Tensor, scale: int, lpips_network: Any) -> None:
    """Scores of the samples (n, 3, H, W) of one image, all uint8."""
    target = hr.expand_as(samples)
    consistency = lr_psnr(samples, lr.expand(len(samples), -1, -1, -1), scale)
    scores.add(
        psnr=float(psnr(samples, target).mean()),
        ssim=float(ssim(samples, target).mean()),
        lr_psnr=float(consistency.mean()),
        lr_psnr_worst=float(consistency.min()),
        diversity=diversity_score(error_maps(to_float(samples), to_float(hr))),
    )
    if lpips_network is not None:
        maps = lpips(to_float(samples), to_float(hr), lpips_network)
        scores.add(lpips=float(maps.mean()), lpips_diversity=diversity_score(maps))


def table(scores: list[Scores]) -> str:
    """A plain-text table of the means, one method a line."""
    headers = {
        "psnr": "PSNR dB", "ssim": "SSIM", "lr_psnr": "LR-PSNR dB", "lr_psnr_worst": "worst", "diversity": "diversity (MSE)",
        "lpips": "LPIPS", "lpips_diversity": "diversity (LPIPS)", "seconds": "s/sample",
    }  # fmt: skip
    means = [(score.method, score.means()) for score in scores]
    keys = [key for key in headers if any(key in values for _, values in means)]
    lines = [["", *(headers[key] for key in keys)]]
    for method, values in means:
        lines.append(
            [
                method,
                *(
                    f"{values[key]:.{3 if key in ('ssim', 'lpips', 'seconds') else 2}f}" if key in values else "-"
                    for key in keys
                ),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
