"""Originals and samples of a challenge that no one held: drawn pictures, and the same with noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((75, 90), (64, 70))  # heights and widths that are no multiples of 8


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (H, W, 3) with smooth parts and edges."""
    y, x = np.mgrid[:height, :width] / 9
    channels = [
        128 + 60 * np.sin(x + seed + shift) * np.cos(y - shift) + 50 * (x * (shift + 1) % 3 > 1.5) for shift in range(3)
    ]
    return np.stack(channels, axis=2).clip(0, 255).astype(np.uint8)


def draw(folder: Path, n: int = 3, first: int = 801, offset: int = 0, sizes=SIZES) -> tuple[Path, Path]:
    """Folders hr and sr: an original of each size, and n samples of each, of the size of the crop; the challenge's names."""
    hr, sr = folder / "hr", folder / "sr"
    hr.mkdir(parents=True)
    sr.mkdir()
    random = np.random.default_rng(0)
    for place, (height, width) in enumerate(sizes):
        image = picture(height, width, place)
        Image.fromarray(image).save(hr / f"{first + place:04d}.png")
        crop = image[: height // 8 * 8, : width // 8 * 8].astype(float)
        for index in range(n):
            noisy = (crop + random.normal(scale=4 + 2 * index, size=crop.shape)).round().clip(0, 255).astype(np.uint8)
            name = f"{offset + place:06d}.png" if n == 1 else f"{offset + place:06d}_sample{index:05d}.png"
            Image.fromarray(noisy).save(sr / name)
    return hr, sr
