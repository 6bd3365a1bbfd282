"""The challenge's protocol as its description reads, an image and a weight at a time, in NumPy: what ours is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def shrunk_rows(image: np.ndarray, scale: int) -> np.ndarray:
    """One pass of MATLAB's imresize by 1/scale, rounded and clipped."""
    height = len(image)
    out = np.zeros((math.ceil(height / scale), *image.shape[1:]))
    for row in range(len(out)):
        centre = (row + 0.5) * scale - 0.5
        taps = range(math.floor(centre - 2 * scale), math.ceil(centre + 2 * scale) + 1)
        weights = [cubic((centre - tap) / scale) / scale for tap in taps]
        for tap, weight in zip(taps, weights):
            mirrored = -tap - 1 if tap < 0 else 2 * height - tap - 1 if tap >= height else tap
            out[row] += weight / sum(weights) * image[mirrored]
    return np.clip(np.round(out), 0, 255)


def shrunk(image: np.ndarray, scale: int) -> np.ndarray:
    return shrunk_rows(shrunk_rows(image, scale).swapaxes(0, 1), scale).swapaxes(0, 1).astype(np.uint8)


def tensor(image: np.ndarray) -> Tensor:
    return 2 * (torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)) / 255) - 1


def score(means: Sequence[float], maps: Sequence[np.ndarray]) -> float:
    best, local = min(means), np.min(np.stack(maps), axis=0).mean()
    return (best - local) / best * 100


def measure(original: Path, samples: Sequence[Path], scale: int, network: Network) -> tuple[dict, dict]:
    """The values of an image, and its curves."""
    gt = np.asarray(Image.open(original).convert("RGB"))
    gt = gt[: len(gt) // 8 * 8, : gt.shape[1] // 8 * 8]
    perceptual, squared, psnrs, ssims, consistency = [], [], [], [], []
    for sample in samples:
        sr = np.asarray(Image.open(sample).convert("RGB"))[: gt.shape[0], : gt.shape[1]]
        with torch.no_grad():
            perceptual.append(network(tensor(sr), tensor(gt))[0, 0].double().numpy())
        error = ((sr.astype(float) - gt) ** 2).mean(axis=2)
        squared.append(convolve2d(error, np.ones((16, 16)) / 256))
        psnrs.append(peak_signal_noise_ratio(gt, sr))
        ssims.append(structural_similarity(gt, sr, channel_axis=2))
        consistency.append(peak_signal_noise_ratio(shrunk(gt, scale), shrunk(sr, scale)))
    curves = {}
    for kind, maps in (("lpips", perceptual), ("mse", squared)):
        means = [one.mean() for one in maps]
        counts = range(1, len(samples) + 1)
        curves[f"{kind}_mean"] = [np.mean(means[:n]) for n in counts]
        curves[f"{kind}_best_local"] = [np.min(np.stack(maps[:n]), axis=0).mean() for n in counts]
        curves[f"{kind}_difference"] = [min(means[:n]) - curves[f"{kind}_best_local"][n - 1] for n in counts]
        curves[f"{kind}_score"] = [score(means[:n], maps[:n]) for n in counts]
    values = {
        "lpips": curves["lpips_mean"][-1],
        "lr_psnr": np.mean(consistency),
        "lr_psnr_worst": np.min(consistency),
        "diversity": curves["lpips_score"][-1],
        "psnr": np.mean(psnrs),
        "ssim": np.mean(ssims),
    }
    return values, curves
