"""Methods that are measured: files of samples, bicubic enlargement, generators and flows, all by one interface."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ncsr_fast.convert import read_model
from ncsr_fast.data.images import read_image, to_float
from ncsr_fast.encoder.blocks import ResidualNoise
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.hub import find_model
from ncsr_fast.metrics.fidelity import check_to_8bit, to_uint8
from ncsr_fast.metrics.imresize import imresize
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import is_low_light
from ncsr_fast.systems import TEMPERATURE

BICUBIC = "bicubic"


class Method(Protocol):
    """A maker of samples of LR images, or a holder of them."""

    n: int  # samples of each image
    to_8bit: str | None  # how they became 8 bits, for reports: "round" or "truncate"; None where that is not known

    def samples(self, place: int, lr: Tensor) -> Iterator[Tensor]:
        """The n samples uint8 (3, H, W) of the LR image uint8 (3, h, w) of the original at `place`, one after the other."""

    def likelihood(self, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """Further values of an original uint8 (3, H, W) and its LR image.

        nll and bits_per_dim of a flow that is asked for them, else none.
        """

    def description(self) -> dict[str, Any]:
        """Kind, origin and settings, for reports."""


class _Unlikely:
    """A method without a likelihood."""

    def likelihood(self, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """No further values."""
        return {}


class Folder(_Unlikely):
    """Samples that another program wrote: from `find_samples`. The next file is decoded while one is measured.

    `to_8bit` is how that program made 8 bits, where it is known; files do not say it.
    """

    def __init__(self, folder: str | os.PathLike, files: Sequence[Sequence[Path]], to_8bit: str | None = None) -> None:
        self.folder, self._files, self.n, self.to_8bit = Path(folder), files, len(files[0]), to_8bit

    def samples(self, place: int, lr: Tensor) -> Iterator[Tensor]:
        """The samples of an LR image, as `Method` has it."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            waiting = None
            for file in self._files[place]:
                following = reader.submit(read_image, file)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            yield waiting.result()

    def description(self) -> dict[str, Any]:
        """Kind, origin and settings, for reports."""
        return {"kind": "folder", "path": str(self.folder)}


class Bicubic(_Unlikely):
    """MATLAB's bicubic enlargement: one sample, which `imresize` rounds."""

    n, to_8bit = 1, "round"

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def samples(self, place: int, lr: Tensor) -> Iterator[Tensor]:
        """The samples of an LR image, as `Method` has it."""
        yield imresize(lr, self._scale)

    def description(self) -> dict[str, Any]:
        """Kind, origin and settings, for reports."""
        return {"kind": BICUBIC}


class Generator(_Unlikely):
    """A deterministic generator (RRDB, ESRGAN, Real-ESRGAN …): one sample; n where its noise of training is drawn (ESRGAN+).

    Args:
        model: As `RRDB.from_pretrained` reads it.
        path: Where it is from, for reports.
        n: Samples, for a generator with `training_noise`; without it all would be the same, and there is one.
        seed: Of the noise of each image.
        to_8bit: As for `to_uint8`.
    """

    def __init__(self, model: RRDB, path: str, n: int = 1, seed: int = 0, to_8bit: str = "round") -> None:
        check_to_8bit(to_8bit)
        self.noise = model.training_noise
        self._model, self._path, self._seed, self.to_8bit = model.train(self.noise != "none"), path, seed, to_8bit
        self.n = n if self.noise != "none" else 1

    @torch.no_grad()
    def samples(self, place: int, lr: Tensor) -> Iterator[Tensor]:
        """The samples of an LR image, as `Method` has it."""
        like = next(self._model.parameters())
        generator = torch.Generator(like.device).manual_seed(self._seed)
        for module in self._model.modules():
            if isinstance(module, ResidualNoise):
                module.draw = lambda y: torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        for _ in range(self.n):
            yield to_uint8(_finite(self._model(to_float(lr)[None].to(like))[0]), self.to_8bit)

    def description(self) -> dict[str, Any]:
        """Kind, origin and settings, for reports."""
        return {"kind": "generator", "path": self._path, "network": self._model.describe(), "noise": self.noise}


class Flow:
    """A flow, sampled at a temperature.

    Args:
        model: As `NCSR.from_pretrained` reads it.
        path: Where it is from, for reports.
        n: Samples; one at temperature 0.
        temperature: Of the latents.
        seed: Of the latents of each image.
        to_8bit: As for `to_uint8`.
        likelihood: True for the values nll and bits_per_dim, a pass more.
    """

    def __init__(
        self,
        model: NCSR,
        path: str,
        n: int = 10,
        temperature: float = TEMPERATURE,
        seed: int = 0,
        to_8bit: str = "round",
        likelihood: bool = False,
    ) -> None:
        check_to_8bit(to_8bit)
        self._model, self._path, self.n = model, path, n if temperature > 0 else 1
        self._temperature, self._seed, self.to_8bit, self._likelihood = temperature, seed, to_8bit, likelihood

    @torch.no_grad()
    def samples(self, place: int, lr: Tensor) -> Iterator[Tensor]:
        """The samples of an LR image, as `Method` has it."""
        like = next(self._model.parameters())
        generator = torch.Generator(like.device).manual_seed(self._seed)
        small = to_float(lr)[None].to(like)
        for sample in self._model.sample(small, self.n, self._temperature, generator, on_nonfinite="raise")[0]:
            yield to_uint8(sample, self.to_8bit)

    @torch.no_grad()
    def likelihood(self, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """The values nll and bits_per_dim of an original uint8 (3, H, W) and its LR image, where they are asked for.

        nll has the published unit: bits per HR pixel position, of values in [0, 1] without added noise; bits_per_dim is the
        same divided by the channels.
        """
        if not self._likelihood:
            return {}
        like = next(self._model.parameters())
        bits = float(self._model.nll(to_float(hr)[None].to(like), to_float(lr)[None].to(like)))
        return {"nll": bits, "bits_per_dim": bits / len(hr)}

    def description(self) -> dict[str, Any]:
        """Kind, origin and settings, for reports."""
        return {"kind": "flow", "path": self._path, "temperature": self._temperature, "seed": self._seed}


def load_method(
    model: str | os.PathLike,
    scale: int | None = None,
    *,
    n: int = 10,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    to_8bit: str = "round",
    likelihood: bool = False,
    long_skip: str | None = None,
    noise: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Method, int]:
    """A model as a method, and its scale.

    Args:
        model: "bicubic"; or a flow or a generator, whatever `NCSR.from_pretrained` and `RRDB.from_pretrained` read.
        scale: That is asked for; None: the model's. Bicubic enlargement has none of its own.
        n: Samples of each image.
        temperature: Of a flow.
        seed: Of a flow's latents, or a generator's noise.
        to_8bit: As for `to_uint8`.
        likelihood: As for `Flow`.
        long_skip: As for `RRDB.from_pretrained`.
        noise: Where a generator's noise is drawn: "none", "dense", "all"; None as its file has it.
        device: That computes.

    Raises:
        ValueError: A model of another scale, no scale of bicubic, or a low-light model; and as `from_pretrained`.
    """
    if os.fspath(model) == BICUBIC:
        if scale is None:
            raise ValueError("bicubic enlargement needs a scale: give --scale")
        return Bicubic(scale), scale
    network = read_model(find_model(model), None, long_skip)[0].to(device).eval()
    own = network.scale if isinstance(network, RRDB) else network.flow.scale
    if scale not in (None, own):
        raise ValueError(f"{os.fspath(model)!r} is a model of scale {own}, not {scale}")
    if isinstance(network, RRDB):
        if noise is not None:
            network.training_noise = noise
        return Generator(network, os.fspath(model), n, seed, to_8bit), own
    if is_low_light(network):
        raise ValueError(
            f"{network.describe()}, makes dark photographs bright, and the challenge is of super-resolution: "
            "leave --protocol out, and give the dark photographs, --lr-images"
        )
    return Flow(network, os.fspath(model), n, temperature, seed, to_8bit, likelihood), own


def _finite(image: Tensor) -> Tensor:
    if not bool(image.isfinite().all()):
        raise ValueError("the generator's image has NaN or infinite values")
    return image
