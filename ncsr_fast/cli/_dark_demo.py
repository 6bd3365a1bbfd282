"""The demo of a low-light model: photographs made dark, and made bright again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.data.darkening import darken
from ncsr_fast.data.images import to_float
from ncsr_fast.data.low_light import crop_margins, match_brightness
from ncsr_fast.metrics import psnr
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import photograph_input

COLUMNS = ["dark", "temperature 0", "sample 1", "sample 2", "original"]
HEADER = f"{'':12}{'PSNR dark':>11}{'PSNR T=0':>10}{'at reference brightness':>25}{'PSNR samples':>14}"
_GAMMA, _GAIN, _NOISE = 2.5, 0.5, 0.008


class Shown(NamedTuple):
    """A photograph of the demo.

    Args:
        name: Of the photograph.
        line: The figures of it, under `HEADER`.
        tiles: Images (3, H, W), under `COLUMNS`.
        samples: All samples (n, 3, H, W).
    """

    name: str
    line: str
    tiles: list[Tensor]
    samples: Tensor


@torch.no_grad()
def brightened(model: NCSR, photographs: Mapping[str, Tensor], n: int, temperature: float, seed: int) -> Iterator[Shown]:
    """Every photograph, uint8 (3, H, W) by name, made dark by `darken` and bright by the model."""
    for name, image in photographs.items():
        dark = darken(image, _GAMMA, _GAIN, _NOISE, torch.Generator().manual_seed(seed)).to(image.device)
        lr, margins = photograph_input(model, dark)
        generator = torch.Generator(lr.device).manual_seed(seed)
        likely = crop_margins(model.sample(lr, 1, 0.0, generator)[0], margins)
        samples = crop_margins(model.sample(lr, n, temperature, generator)[0], margins)
        hr = to_float(image)[None].to(likely)
        figures = (
            float(psnr(to_float(dark)[None].to(hr), hr)),
            float(psnr(likely, hr)),
            float(psnr(match_brightness(likely, hr), hr)),
            float(psnr(samples, hr.expand_as(samples)).mean()),
        )
        line = f"{name:12}" + "".join(f"{value:{width}.2f}" for value, width in zip(figures, (11, 10, 25, 14)))
        yield Shown(name, line, [to_float(dark).to(hr), likely[0], *samples[:2], hr[0]], samples)
