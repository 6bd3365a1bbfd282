"""Scores of a model on photographs: fidelity, consistency with the LR image, and diversity of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import crop_to_multiple, to_float
from ncsr_fast.data.perturb import degrade
from ncsr_fast.metrics.fidelity import lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.metrics.perceptual import diversity_score, error_maps, lpips
from ncsr_fast.model import NCSR

_MULTIPLE = 8  # many scripts crop HR images to sides that are multiples of 8, whatever the scale


@dataclass
class Scores:
    """Means over images for one method; `lr_psnr_worst` is the mean of the smallest value among an image's samples."""

    method: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add the values of one more image."""
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)

    def means(self) -> dict[str, float]:
        """The mean of every value over the images."""
        return {key: sum(values) / len(values) for key, values in self.values.items()}


@torch.no_grad()
def timed_samples(model: NCSR, lr: Tensor, n: int, temperature: float, seed: int) -> tuple[Tensor, float]:
    """n samples (n, 3, sH, sW) in [0, 1] of one uint8 LR image (3, H, W), and the seconds per sample."""
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
    """Scores of bicubic interpolation and of `model` at each temperature (one sample at temperature 0, else n).

    Args:
        model: The model.
        images: HR images, uint8 (3, H, W), as for `Evaluation.add`.
        temperatures: Temperatures of the samples.
        n: Number of samples of each image at temperatures above 0.
        seed: Seed of the latents of each image.
        lpips_network: From `metrics.lpips_model`; None leaves LPIPS out.
        lr_images: LR images of `images`; None: made by MATLAB's bicubic.
        progress: Function that is called with a line about each image.

    Returns:
        The scores, as `Evaluation.scores`.

    Raises:
        ValueError: The numbers of images and lr_images differ; and as for `Evaluation.add`.
    """
    evaluation = Evaluation(model, temperatures, n, seed, lpips_network)
    given = iter(lr_images) if lr_images is not None else None
    for number, image in enumerate(images):
        lr = None if given is None else next(given, None)
        if given is not None and lr is None:
            raise ValueError(f"there are {number} lr_images, but more images")
        progress(f"image {number}: {evaluation.add(image, lr)}")
    if given is not None and next(given, None) is not None:
        raise ValueError(f"there are {evaluation.count} images, but more lr_images")
    return evaluation.scores


class Evaluation:
    """Scores of bicubic interpolation and of a model at each temperature, image by image; arguments as for `evaluate`.

    Attributes:
        scores: One `Scores` per method: psnr, ssim, lr_psnr, lr_psnr_worst, diversity (`diversity_score` of `error_maps`),
            seconds (per sample); with LPIPS also lpips and lpips_diversity, the challenge's score. All per image, every
            sample counted alike.
    """

    def __init__(
        self, model: NCSR, temperatures: Iterable[float], n: int = 10, seed: int = 0, lpips_network: Any = None
    ) -> None:
        self._model, self._temperatures, self._n, self._seed = model, list(dict.fromkeys(temperatures)), n, seed
        self._lpips_network = lpips_network
        self.scores = [Scores("bicubic"), *(Scores(f"temperature {temperature:g}") for temperature in self._temperatures)]

    @property
    def count(self) -> int:
        """The number of images so far."""
        return len(self.scores[0].values.get("psnr", ()))

    def add(self, image: Tensor, lr: Tensor | None = None) -> str:
        """Measure an image; an error leaves the scores as they were.

        Args:
            image: uint8 (3, H, W), sides of at least 8.
            lr: The uint8 LR image of `image`; None: made by MATLAB's bicubic. Sides of `image` need not be multiples of the
                scale: `image` is cropped at the top left to multiples of the scale, or of 8 (Set14 and many scripts).

        Returns:
            The PSNR of each method, in a line.

        Raises:
            ValueError: The sizes of the two images do not fit, or are too small to be measured.
        """
        device, scale = next(self._model.parameters()).device, self._model.config.scale
        hr = matching_crop(image, None if lr is None else tuple(lr.shape[-2:]), scale).to(device)
        lr = degrade(hr, scale) if lr is None else lr.to(device)
        found = [self._measured(imresize(lr, scale)[None], hr, lr)]
        for temperature in self._temperatures:
            samples, seconds = timed_samples(self._model, lr, self._n if temperature > 0 else 1, temperature, self._seed)
            found.append({"seconds": seconds, **self._measured(to_uint8(samples), hr, lr)})
        for scores, values in zip(self.scores, found):
            scores.add(**values)
        return ", ".join(f"{score.method} {score.values['psnr'][-1]:.2f} dB" for score in self.scores)

    def _measured(self, samples: Tensor, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """Values of the samples (n, 3, H, W) of one image, all uint8."""
        target = hr.expand_as(samples)
        consistency = lr_psnr(samples, lr.expand(len(samples), -1, -1, -1), self._model.config.scale)
        values = {
            "psnr": float(psnr(samples, target).mean()),
            "ssim": float(ssim(samples, target).mean()),
            "lr_psnr": float(consistency.mean()),
            "lr_psnr_worst": float(consistency.min()),
            "diversity": diversity_score(error_maps(to_float(samples), to_float(hr))),
        }
        if self._lpips_network is not None:
            maps = lpips(to_float(samples), to_float(hr), self._lpips_network)
            values |= {"lpips": float(maps.mean()), "lpips_diversity": diversity_score(maps)}
        return values


def matching_crop(hr: Tensor, lr_size: tuple[int, int] | None, scale: int) -> Tensor:
    """The top left part of an HR image (3, H, W) that fits an LR image of `lr_size`; sides are multiples of scale or 8.

    Without `lr_size`, the largest part with multiples of the scale. Raises ValueError, with the sizes, if no part fits.
    """
    height, width = hr.shape[-2:]
    if min(height, width) < _MULTIPLE:
        raise ValueError(f"the HR image is {height}×{width}, less than {_MULTIPLE}×{_MULTIPLE}, too small to be measured")
    for crop in (crop_to_multiple(hr, scale), crop_to_multiple(hr, _MULTIPLE)):
        if lr_size is None or tuple(crop.shape[-2:]) == (scale * lr_size[0], scale * lr_size[1]):
            return crop
    raise ValueError(
        f"the HR image is {height}×{width} and the LR image {lr_size[0]}×{lr_size[1]}, "
        f"which should be {height // scale}×{width // scale} at scale {scale}"
    )


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
