"""The pictures of an image that are worth comparing: LR, bicubic, samples, temperatures, the original, and their metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.checks import check_count, check_seed, check_temperature, check_tile
from ncsr_fast.data.images import crop_to_multiple, to_float
from ncsr_fast.data.low_light import crop_margins
from ncsr_fast.data.perturb import degrade
from ncsr_fast.evaluation.temperatures import matching_crop
from ncsr_fast.flow.samples import ConditionedFlow
from ncsr_fast.metrics.fidelity import check_to_8bit, lr_psnr, psnr, ssim, to_uint8
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.metrics.perceptual import LPIPSReference
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import is_low_light, photograph_input

MOST_PIXELS = 2**20  # of a picture: as PNG files of photographs, the pictures of one image then take about 30 MB of a page
_MULTIPLE = 8  # of which the sides of an original without LR image are made, as `ncsr-fast evaluate` does
_TOPS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # a standard deviation of levels from 0 to 255 is at most 255/2 of many
_SHOWN = 0.995  # part of the pixels whose standard deviation the colours distinguish


class Picture(NamedTuple):
    """One picture of an image.

    Args:
        key: "lr", "bicubic", "sample-0", …, "temperature-0.3", … or "original".
        label: What it is called.
        pixels: uint8 (3, H, W), on the CPU.
        metrics: psnr and lr_psnr in dB, ssim, lpips: those that could be computed.
    """

    key: str
    label: str
    pixels: Tensor
    metrics: dict[str, float]

    @property
    def kind(self) -> str:
        """The key without its number."""
        return self.key.split("-")[0]


class Deviation(NamedTuple):
    """The standard deviation over the samples of an image.

    Args:
        levels: float32 (H, W), in 8-bit levels: the root mean square over the channels of the standard deviation (n - 1).
        top: The level that colours go up to: nearly all pixels are below.
    """

    levels: Tensor
    top: float


@dataclass
class View:
    """The pictures of an image.

    Args:
        name: Of the image.
        scale: From LR to HR.
        pictures: In the order in which they are shown.
        deviation: None of a single sample.
        notes: What could not be computed, and why; what part of an image is shown.
    """

    name: str
    scale: int
    pictures: list[Picture]
    deviation: Deviation | None
    notes: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Picture]:
        """The pictures of a kind."""
        return [picture for picture in self.pictures if picture.kind == kind]


class Viewer:
    """Makes the pictures of images.

    Args:
        model: The model.
        n: Samples of each image.
        temperature: Of the samples.
        temperatures: Of further pictures, one each, by the latents of the first sample at another temperature.
        seed: Of the latents of each image.
        tile: As for `NCSR.sample`.
        to_8bit: As for `to_uint8`.
        crop: LR pixels a side of the middle part of larger images that is shown; None: whole images.
        lpips_network: From `metrics.lpips_model`; None to leave LPIPS out.

    Raises:
        ValueError: n or crop below 1, a negative temperature, another tile or to_8bit, a seed outside 0 … 2⁶⁴ - 1.
    """

    def __init__(
        self,
        model: NCSR,
        n: int = 6,
        temperature: float = 0.9,
        temperatures: Iterable[float] = (0.0, 0.3, 0.6, 0.9),
        seed: int = 0,
        *,
        tile: int | str | None = "auto",
        to_8bit: str = "round",
        crop: int | None = None,
        lpips_network: Any = None,
    ) -> None:
        check_count("n", n)
        check_seed(seed)
        check_tile(tile)
        check_to_8bit(to_8bit)
        self.model, self.scale = model, model.flow.scale
        self.n, self.temperature, self.temperatures = n, temperature, list(dict.fromkeys(temperatures))
        for value in (temperature, *self.temperatures):
            check_temperature(value)
        if crop is not None:
            check_count("crop", crop)
        self.seed, self.tile, self.to_8bit, self.crop = seed, tile, to_8bit, crop
        self._lpips_network = lpips_network
        self._device = next(model.parameters()).device

    def settings(self) -> dict[str, str]:
        """The settings by their names, as a page shows them."""
        return {
            "samples": f"{self.n} at temperature {self.temperature:g}",
            "seed": str(self.seed),
            "8 bits": self.to_8bit,
        }

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for an LR image whose pictures are too large for a page."""
        if self.crop is not None:
            height, width = min(height, self.crop), min(width, self.crop)
        pixels = height * width * self.scale**2
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"its pictures would have {pixels / 1e6:.1f} megapixels each, more than the {MOST_PIXELS / 1e6:.1f} of a page: "
                f"crop it to its middle, of at most {self.largest_side} LR pixels a side"
            )

    def check_made(self) -> None:
        """Raise ValueError for a model whose LR images cannot be made of originals."""
        if is_low_light(self.model):
            raise ValueError(f"{self.model.describe()}, reads dark photographs, which cannot be made of originals: give them")

    @property
    def largest_side(self) -> int:
        """LR pixels a side of the largest square whose pictures a page takes."""
        return math.isqrt(MOST_PIXELS) // self.scale

    @torch.no_grad()
    def view(self, name: str, lr: Tensor | None, hr: Tensor | None = None) -> View:
        """The pictures of an image.

        Args:
            name: Of the image.
            lr: uint8 (3, H, W); None: made of `hr` by MATLAB's bicubic, as `ncsr-fast evaluate` makes it.
            hr: The original, uint8, of the size of the pictures, or cropped to it at the top left as `matching_crop` does; or
                None.

        Raises:
            TypeError: An image is not uint8.
            ValueError: An image is not (3, H, W), the sizes of the two do not fit, the pictures would be too large, or there is
                no image.
            NonFiniteSamples: A sample blew up.
        """
        for argument, image in (("lr", lr), ("hr", hr)):
            if image is not None:
                _check_photograph(argument, image)
        lr, hr = self._pair(lr, hr)
        self.check_size(*lr.shape[1:])
        lr, hr, notes = self._middle(lr, hr)
        small, margins = photograph_input(self.model, lr)
        flow = self.model.condition(small, tile=self.tile)

        def drawn(n: int, temperature: float) -> Tensor:
            return to_uint8(crop_margins(self._drawn(flow, n, temperature), margins), self.to_8bit)

        measure = _Measure(lr, hr, None if is_low_light(self.model) else self.scale, self._lpips_network)
        pictures = [Picture("lr", "Dark photograph" if is_low_light(self.model) else "LR (nearest)", lr.cpu(), {})]
        if self.scale > 1:
            pictures += measure.pictures({"bicubic": "Bicubic"}, imresize(lr, self.scale)[None])
        samples = drawn(self.n, self.temperature)
        pictures += measure.pictures({f"sample-{number}": f"Sample {number}" for number in range(self.n)}, samples)
        for temperature in self.temperatures:
            named = {f"temperature-{temperature:g}": f"Temperature {temperature:g}"}
            pictures += measure.pictures(named, drawn(1, temperature))
        if hr is not None:
            pictures.append(Picture("original", "Original", hr.cpu(), {}))
        notes += measure.notes
        if self.n == 1:
            notes.append("One sample has no standard deviation.")
        return View(name, self.scale, pictures, deviation_of(samples) if self.n > 1 else None, notes)

    def _drawn(self, flow: ConditionedFlow, n: int, temperature: float) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(self.seed)
        return flow.sample(n, temperature, generator, tile=self.tile, on_nonfinite="raise")[0]

    def _pair(self, lr: Tensor | None, hr: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both images on the device, the original of the size of the pictures."""
        if lr is None:
            if hr is None:
                raise ValueError("there is neither an LR image nor an original")
            self.check_made()
            hr = hr.to(self._device)
            hr = matching_crop(crop_to_multiple(hr, _MULTIPLE) if min(hr.shape[1:]) >= _MULTIPLE else hr, None, self.scale)
            return degrade(hr, self.scale), hr
        lr = lr.to(self._device)
        return lr, None if hr is None else matching_crop(hr, tuple(lr.shape[1:]), self.scale).to(self._device)

    def _middle(self, lr: Tensor, hr: Tensor | None) -> tuple[Tensor, Tensor | None, list[str]]:
        """The part of the images that is shown, and what is said of it."""
        height, width = lr.shape[1:]
        side = max(height, width) if self.crop is None else self.crop
        if side >= max(height, width):
            return lr, hr, []
        box = [
            slice((whole - part) // 2, (whole + part) // 2)
            for whole, part in ((height, min(height, side)), (width, min(width, side)))
        ]
        rows, columns = box
        lr = lr[:, rows, columns].contiguous()
        if hr is not None:
            large = [slice(self.scale * part.start, self.scale * part.stop) for part in box]
            hr = hr[:, large[0], large[1]].contiguous()
        return lr, hr, [f"The middle of an image of {width}×{height} pixels."]


def _check_photograph(argument: str, image: Tensor) -> None:
    """Raise unless `image` is as `read_image` reads a file."""
    if image.dtype != torch.uint8:
        raise TypeError(f"{argument} must be uint8, as read_image reads files, not {image.dtype}")
    if image.dim() != 3 or len(image) != 3:
        raise ValueError(f"{argument} must have shape (3, H, W), not {tuple(image.shape)}")


class _Measure:
    """Metrics of the pictures of an image, and notes on those that could not be computed.

    Args:
        lr: uint8 (3, H, W).
        hr: uint8 (3, sH, sW), or None.
        scale: Of the bicubic reduction that LR-PSNR compares with `lr`; None: there is none, of dark photographs.
        network: As for `Viewer`.
    """

    def __init__(self, lr: Tensor, hr: Tensor | None, scale: int | None, network: Any) -> None:
        self.notes: list[str] = []
        self._of: dict[str, Callable[[Tensor], Tensor]] = {}
        if hr is None:
            self.notes.append("PSNR, SSIM and LPIPS compare with an original, and none was given.")
        else:
            self._of["psnr"] = lambda images: psnr(images, hr.expand_as(images))
            self._of["ssim"] = lambda images: ssim(images, hr.expand_as(images))
        if scale is not None:
            self._of["lr_psnr"] = lambda images: lr_psnr(images, lr.expand(len(images), -1, -1, -1), scale)
        if hr is not None and network is not None:
            try:
                reference = LPIPSReference(to_float(hr), network)
                self._of["lpips"] = lambda images: reference(to_float(images)).flatten(1).mean(dim=1)
            except ValueError as error:
                self.notes.append(f"{error}.")

    def pictures(self, labels: Mapping[str, str], images: Tensor) -> list[Picture]:
        """The images, uint8 (k, 3, H, W), as pictures with their metrics, by their keys and labels."""
        found = {name: measured(images).tolist() for name, measured in self._of.items()}
        return [
            Picture(key, label, image, {name: values[place] for name, values in found.items()})
            for place, ((key, label), image) in enumerate(zip(labels.items(), images.cpu()))
        ]


def deviation_of(samples: Tensor) -> Deviation:
    """The standard deviation over samples, uint8 (n, 3, H, W) with n ≥ 2."""
    variance = samples.float().var(dim=0, correction=1)
    levels = variance.mean(dim=0).sqrt().cpu()
    most = float(levels.flatten().kthvalue(max(1, int(_SHOWN * levels.numel()))).values)
    return Deviation(levels, next((top for top in _TOPS if top >= most), _TOPS[-1]))
