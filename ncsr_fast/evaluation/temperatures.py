"""Measuring a model on photographs: fidelity, consistency with the LR image, and diversity of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import crop_to_multiple, to_float
from ncsr_fast.data.perturb import degrade
from ncsr_fast.metrics.fidelity import check_to_8bit, lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.metrics.perceptual import LPIPSReference, diversity_score, error_maps
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import is_low_light

_MULTIPLE = 8  # of which many scripts make the sides of HR images, whatever the scale


@dataclass
class Scores:
    """Means over images of one method. `lr_psnr_worst` is the smallest of an image's samples, meaned over images."""

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
    to_8bit: str = "round",
) -> list[Scores]:
    """Scores of bicubic enlargement and of `model` at each temperature (one sample at temperature 0, else n).

    images         uint8 (3, H, W), as `Evaluation.add` takes them; lr_images their LR images, None for MATLAB bicubic
    lpips_network  from `metrics.lpips_model`, None to leave LPIPS out
    to_8bit        how samples become 8 bits, as for `to_uint8`
    returns        what `Evaluation.scores` is
    raises         ValueError for images and lr_images that are not as many, and as `Evaluation.add` does
    """
    evaluation = Evaluation(model, temperatures, n, seed, lpips_network, to_8bit)
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
    """Scores of bicubic enlargement and of a model at each temperature, image by image; arguments as of `evaluate`.

    Attributes:
        scores: One `Scores` a method: psnr, ssim, lr_psnr, lr_psnr_worst, diversity (`diversity_score` of `error_maps`),
            seconds (per sample); with LPIPS also lpips and lpips_diversity, the challenge's score. All per image, every
            sample counted alike.

    Raises:
        ValueError: A low-light model.
    """

    def __init__(
        self,
        model: NCSR,
        temperatures: Iterable[float],
        n: int = 10,
        seed: int = 0,
        lpips_network: Any = None,
        to_8bit: str = "round",
    ) -> None:
        check_to_8bit(to_8bit)
        self._to_8bit = to_8bit
        if is_low_light(model):
            raise ValueError(
                f"{model.describe()}, makes dark photographs bright, and what is measured here are enlarged ones: "
                "LowLightEvaluation measures it"
            )
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
            lr: Its uint8 LR image, None for MATLAB bicubic. Sides of `image` need not be multiples of the scale: the LR
                image is that of its top left, cropped to multiples of the scale, or of 8 (Set14 and many scripts).

        Returns:
            The PSNR of each method, in a line.

        Raises:
            ValueError: The sizes of the two do not fit, or are too small to be measured.
        """
        device, scale = next(self._model.parameters()).device, self._model.config.scale
        hr = matching_crop(image, None if lr is None else tuple(lr.shape[-2:]), scale).to(device)
        lr = degrade(hr, scale) if lr is None else lr.to(device)
        reference = None if self._lpips_network is None else LPIPSReference(to_float(hr), self._lpips_network)
        found = [self._measured(imresize(lr, scale)[None], hr, lr, reference)]
        for temperature in self._temperatures:
            samples, seconds = timed_samples(self._model, lr, self._n if temperature > 0 else 1, temperature, self._seed)
            found.append({"seconds": seconds, **self._measured(to_uint8(samples, self._to_8bit), hr, lr, reference)})
        for scores, values in zip(self.scores, found):
            scores.add(**values)
        return ", ".join(f"{score.method} {score.values['psnr'][-1]:.2f} dB" for score in self.scores)

    def _measured(self, samples: Tensor, hr: Tensor, lr: Tensor, reference: LPIPSReference | None) -> dict[str, float]:
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
        if reference is not None:
            maps = reference(to_float(samples))
            values |= {"lpips": float(maps.mean()), "lpips_diversity": diversity_score(maps)}
        return values


def matching_crop(hr: Tensor, lr_size: tuple[int, int] | None, scale: int) -> Tensor:
    """The top left of an HR image (3, H, W) that an LR image of `lr_size` is of: sides are multiples of the scale, or of 8.

    Without LR image, the largest with multiples of the scale. Raises ValueError, with the sizes, where there is none.
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
