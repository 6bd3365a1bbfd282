"""The protocol of the NTIRE challenges on learning the super-resolution space: measurements of an image, and of a method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncsr_fast.data.images import ImageError, crop_to_multiple, read_image, to_float
from ncsr_fast.evaluation.methods import Method
from ncsr_fast.evaluation.names import MULTIPLE, Originals
from ncsr_fast.evaluation.reports import Report
from ncsr_fast.flow.samples import NonFiniteSamples
from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.metrics.fidelity import psnr, ssim
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.metrics.perceptual import LPIPSReference, lpips_digest, relative_gain
from ncsr_fast.warn import warnings_about

SMALLEST_FOR_LPIPS = 32  # side that AlexNet's two poolings leave something of
_BOX = 16  # side of the box that squared errors are summed in
_BATCH_PIXELS = {"cpu": 2**21, "cuda": 2**24}  # of samples that are measured at once; one at least, so memory is bounded


class ImageMeasurement:
    """An original, and the samples of it so far. What the original decides alone is computed once.

    Args:
        original: uint8 (3, H, W), sides of at least 8, on the device that measures; its top left with multiples of 8 is used.
        scale: Of the super-resolution.
        network: From `metrics.lpips_model`, on that device; None to leave LPIPS out.
        curves: True for the scores of the first 1 … n samples, and for those of MSE maps (2022).

    Raises:
        ValueError: The original is too small for LPIPS.
    """

    def __init__(self, original: Tensor, scale: int, network: Any = None, curves: bool = False) -> None:
        self.hr = crop_to_multiple(original, MULTIPLE)
        self.lr = imresize(self.hr, 1 / scale)
        self._scale = scale
        self._lpips = None if network is None else LPIPSReference(to_float(self.hr), network)
        self._best: dict[str, BestOf] = {} if network is None else {"lpips": BestOf()}
        if curves:
            self._best["mse"] = BestOf(divisor=3 * _BOX**2)
        self._curves = curves
        self._fidelity: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lr_psnr": []}

    @torch.no_grad()
    def add(self, samples: Iterable[Tensor]) -> None:
        """Measure samples, uint8 (3, H, W), a batch at a time; their top left of the original's size is used."""
        height, width = self.hr.shape[1:]
        cropped = (sample[:, :height, :width].to(self.hr.device) for sample in samples)
        pixels = _BATCH_PIXELS[self.hr.device.type]
        for group in _groups(cropped, max(1, pixels // (height * width))):
            self._add(torch.stack(group))

    def _add(self, samples: Tensor) -> None:
        target = self.hr.expand_as(samples)
        self._fidelity["psnr"].append(psnr(samples, target).cpu())
        self._fidelity["ssim"].append(ssim(samples, target))
        small = imresize(samples, 1 / self._scale)
        self._fidelity["lr_psnr"].append(psnr(small, self.lr.expand_as(small)).cpu())
        if self._lpips is not None:
            self._best["lpips"].add(self._lpips(to_float(samples)))
        if self._curves:
            self._best["mse"].add(box_sums(samples, self.hr))

    def values(self) -> dict[str, float | None]:
        """lpips, lr_psnr, psnr and ssim, means over the samples; lr_psnr_worst; and diversity, the challenge's score."""
        found = {name: torch.cat(values) for name, values in self._fidelity.items()}
        lpips = self._best.get("lpips")
        return {
            "lpips": lpips.mean(-1) if lpips else None,
            "lr_psnr": float(found["lr_psnr"].mean()),
            "lr_psnr_worst": float(found["lr_psnr"].min()),
            "diversity": lpips.score(-1) if lpips else None,
            "psnr": float(found["psnr"].mean()),
            "ssim": float(found["ssim"].mean()),
        }

    def curves(self) -> dict[str, list[float]]:
        """Mean, best_local, difference and score of LPIPS and of MSE maps, for the first 1 … n samples; none without curves."""
        if not self._curves:
            return {}
        return {
            f"{kind}_{name}": [getattr(best, name)(count) for count in range(len(best))]
            for kind, best in self._best.items()
            for name in ("mean", "best_local", "difference", "score")
        }


class BestOf:
    """Maps of the distances of samples to their original: the mean of each, and that of the pixelwise smallest so far.

    Only the smallest are held. `divisor` is that of integer maps, whose sums are exact.

    The methods take an index n of the samples: n counts from 0 and is the last one considered; -1 is all of them.
    """

    def __init__(self, divisor: int = 1) -> None:
        self._divisor = divisor
        self._least: Tensor | None = None
        self._means: list[Tensor] = []  # on the device: nothing waits for it
        self._local: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._means)

    def add(self, maps: Tensor) -> None:
        """Add the maps (n, H, W) of further samples."""
        for one in maps:
            self._least = one if self._least is None else torch.minimum(self._least, one)
            self._means.append(_mean(one) / self._divisor)
            self._local.append(_mean(self._least) / self._divisor)

    def mean(self, n: int) -> float:
        """Mean distance of the samples."""
        means = self._upto(n)
        return sum(means) / len(means)

    def best_local(self, n: int) -> float:
        """Mean of the pixelwise smallest distances."""
        return float(self._local[n])

    def difference(self, n: int) -> float:
        """Mean distance of the best sample, less `best_local`."""
        return min(self._upto(n)) - self.best_local(n)

    def score(self, n: int) -> float:
        """`difference` in percent of the mean distance of the best sample: the diversity score."""
        return relative_gain(min(self._upto(n)), self.best_local(n))

    def _upto(self, n: int) -> list[float]:
        return [float(mean) for mean in (self._means if n == -1 else self._means[: n + 1])]


def _mean(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64 if values.is_floating_point() else torch.int64).double() / values.numel()


def box_sums(samples: Tensor, target: Tensor) -> Tensor:
    """Squared errors of samples (n, 3, H, W) to `target` (3, H, W), uint8, summed over the channels and a sliding 16×16 box.

    Returns:
        int32 (n, H + 15, W + 15): every box that touches the image, with nothing outside of it. Exact.
    """
    x = (samples.to(torch.int32) - target).square_().sum(dim=1, dtype=torch.int32)
    x = torch.nn.functional.pad(x, (_BOX - 1,) * 4)
    for axis in (1, 2):
        step = 1
        while step < _BOX:
            size = x.shape[axis] - step
            x = x.narrow(axis, 0, size) + x.narrow(axis, step, size)
            step *= 2
    return x


def evaluate_method(
    method: Method,
    originals: Originals,
    scale: int,
    *,
    network: Any = None,
    device: torch.device | str = "cpu",
    lr_images: Sequence[Path] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Report, list[str]]:
    """Measure the samples of every original by the protocol.

    Args:
        method: What makes the samples, or reads them.
        originals: From `find_originals`.
        scale: Of the super-resolution.
        network: From `metrics.lpips_model`, on `device`; None to leave LPIPS out, which the report says.
        device: That measures.
        lr_images: The LR image of each original, that models are given; None for MATLAB bicubic of its crop.
        progress: Is told of each image.

    Returns:
        The report, and a line for each image that could not be measured: then the report is of the others.

    Raises:
        ValueError: No image could be measured; the message is that of the first.
    """
    names, rows, curves, problems = [], [], [], []
    for place, (file, name) in enumerate(zip(originals.files, originals.names)):
        try:
            measurement = ImageMeasurement(read_image(file).to(device), scale, network, originals.protocol.curves)
            lr = measurement.lr if lr_images is None else read_image(lr_images[place]).to(device)
            _check_pair(measurement.hr, lr, scale)
            with warnings_about(file):
                measurement.add(method.samples(place, lr))
            row = measurement.values() | method.likelihood(measurement.hr, lr)
        except (ImageError, OSError, ValueError, NonFiniteSamples) as error:
            problems.append(f"{name}: {error}")
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problems.append(f"{name}: it does not fit in memory: measure it on another --device, or crop it")
            continue
        names.append(name)
        rows.append(row)
        curves.append(measurement.curves())
        progress(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items() if value is not None))
    if not rows:
        raise ValueError(problems[0])
    notes = originals.notes()
    if problems:
        notes.append(
            f"{len(problems)} of {len(originals.files)} originals could not be measured: the means are those of the others"
        )
    if network is None:
        notes.append("without LPIPS, and so without the diversity score")
    if originals.protocol.curves:
        notes.append("curves are of the samples in the order of their numbers; the challenge's program shuffles them, unseeded")
    report = Report(
        protocol=originals.protocol.name,
        scale=scale,
        n=method.n,
        to_8bit=method.to_8bit,
        method=method.description(),
        lpips=lpips_digest(network),
        notes=notes,
        names=names,
        rows=rows,
        curves=curves if originals.protocol.curves else None,
    )
    return report, problems


def _check_pair(hr: Tensor, lr: Tensor, scale: int) -> None:
    if tuple(hr.shape[1:]) != tuple(scale * side for side in lr.shape[1:]):
        (height, width), (small_height, small_width) = hr.shape[1:], lr.shape[1:]
        raise ImageError(
            f"the original is {height}×{width} once cropped to multiples of {MULTIPLE}, and its LR image {small_height}×"
            f"{small_width}, not {height // scale}×{width // scale}"
        )


def _groups(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of at most `size` of the items, as they come."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
