"""Measuring a low-light model on pairs of dark and bright photographs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.data.low_light import crop_margins, match_brightness
from ncsr_fast.evaluation.temperatures import Scores
from ncsr_fast.flow.samples import decode_samples, draw
from ncsr_fast.metrics.fidelity import check_to_8bit, psnr, ssim, to_uint8
from ncsr_fast.metrics.perceptual import LPIPSReference
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import photograph_input


class LowLightEvaluation:
    """Scores of dark photographs and of a low-light model at each temperature, pair by pair.

    Args:
        model: A low-light model.
        temperatures: Of the samples: one sample at temperature 0, else n.
        n: Samples of each photograph.
        seed: Of the latents of each photograph.
        lpips_network: From `ncsr_fast.metrics.perceptual.lpips_model`; None leaves LPIPS out.
        to_8bit: How samples become 8 bits, as for `ncsr_fast.metrics.fidelity.to_uint8`.

    Attributes:
        scores: One `Scores` a method: psnr, ssim, seconds (per sample), and with LPIPS also lpips. Methods are the dark
            photograph; and for each temperature the samples, and the samples made as bright as the reference
            (`match_brightness`), which a photographer does not have.
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
        self._model, self._temperatures, self._n, self._seed = model, list(dict.fromkeys(temperatures)), n, seed
        self._lpips_network, self._to_8bit = lpips_network, to_8bit
        methods = (f"temperature {temperature:g}" for temperature in self._temperatures)
        names = ["dark", *(name for method in methods for name in (method, f"{method}, reference's brightness"))]
        self.scores = [Scores(name) for name in names]

    def add(self, image: Tensor, dark: Tensor | None) -> str:
        """Measure a pair; an error leaves the scores as they were.

        Args:
            image: The bright photograph, uint8 (3, H, W).
            dark: The dark one, of its shape.

        Returns:
            The PSNR of each method, in a line.

        Raises:
            ValueError: The sizes of the two differ, or there is no dark photograph.
        """
        if dark is None or image.shape != dark.shape:
            given = "none" if dark is None else f"{dark.shape[-2]}×{dark.shape[-1]}"
            raise ValueError(f"the bright photograph is {image.shape[-2]}×{image.shape[-1]}, the dark one {given}")
        hr = image.to(next(self._model.parameters()).device)
        reference = None if self._lpips_network is None else LPIPSReference(to_float(hr), self._lpips_network)
        found = [self._measured(dark.to(hr.device)[None], hr, reference)]
        for temperature in self._temperatures:
            samples, seconds = self._samples(dark, temperature)
            for each in (samples, match_brightness(samples, to_float(hr).expand_as(samples))):
                found.append({"seconds": seconds, **self._measured(to_uint8(each, self._to_8bit), hr, reference)})
        for scores, values in zip(self.scores, found):
            scores.add(**values)
        return ", ".join(f"{score.method} {score.values['psnr'][-1]:.2f} dB" for score in self.scores)

    @torch.no_grad()
    def _samples(self, dark: Tensor, temperature: float) -> tuple[Tensor, float]:
        """Bright photographs (n, 3, H, W) of a dark one, not clipped, and the seconds each of them took."""
        model, n = self._model, self._n if temperature > 0 else 1
        lr, margins = photograph_input(model, dark)
        generator = torch.Generator(lr.device).manual_seed(self._seed)
        started = time.perf_counter()
        levels = model.conditioned_levels(model.padded(lr))
        images, _ = decode_samples(levels, draw(levels, lr, n, temperature, generator), watch=False)
        if lr.is_cuda:
            torch.cuda.synchronize(lr.device)
        return crop_margins(images[0], margins), (time.perf_counter() - started) / n

    def _measured(self, samples: Tensor, hr: Tensor, reference: LPIPSReference | None) -> dict[str, float]:
        """Values of the uint8 samples (n, 3, H, W) of one photograph."""
        target = hr.expand_as(samples)
        values = {"psnr": float(psnr(samples, target).mean()), "ssim": float(ssim(samples, target).mean())}
        return values if reference is None else {**values, "lpips": float(reference(to_float(samples)).mean())}
