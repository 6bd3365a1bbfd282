"""Drawing samples of conditioned flows, and handling samples that blew up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.checks import check_count, check_tile
from ncsr_fast.config import FlowConfig
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.flow.conditioned import Encoded, Levels, with_prior
from ncsr_fast.flow.inputs import Inputs, enlarged
from ncsr_fast.flow.temperature import Temperature, temperature_for
from ncsr_fast.flow.tiling import Progress, Tiling, encoding_tiling, tiling
from ncsr_fast.layout import has_memory, traced
from ncsr_fast.warn import warn_caller

PRIORS = ("condition", "reference")
ON_NONFINITE = ("warn", "raise", "ignore", "retry")
STATE_BOUND = 1e4  # actnorms keep a healthy state near unit variance: within ±10
RETRIES, COOLING = 4, 0.8  # of a blown-up sample: number of draws, and factor of the temperature at each


class NonFiniteSamples(ArithmeticError):
    """A sample blew up: its state was not finite, or far beyond the states that the flow was trained on."""


class Origin(NamedTuple):
    """The first step at which the state of a sample was not finite or beyond the bound.

    Args:
        level: Number of the level, from the HR side and from 0.
        step: Number of the conditional step, in encoding order and from 0; decoding goes from the last to the first.
    """

    level: int
    step: int

    def __str__(self) -> str:
        return f"level {self.level + 1}, step {self.step}"


class ConditionedFlow:
    """A flow conditioned on LR images, made by `NCSR.condition`; what depends on them alone is computed once.

    Args:
        levels: The levels for the condition.
        inputs: The checks and the padding of arguments.
        lr: The LR images, (B, 3, H, W).
        parameters: Returns the parameters whose changes are noticed: the model's, or none for a flow used at once.
        recording: Function that returns a context in which gradients are recorded as the model requires.
        advice: Function that explains why the samples of LR images blew up.
        reference_mean: Makes the mean of the prior of HR images, where the encoder can.
    """

    def __init__(
        self,
        levels: Levels,
        inputs: Inputs,
        lr: Tensor,
        parameters: Callable[[], Iterable[Tensor]],
        recording: Callable[[], contextlib.AbstractContextManager[None]],
        advice: Callable[[Tensor], str],
        reference_mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._levels, self._inputs, self.lr = levels, inputs, lr
        self._parameters, self._recording, self._advice = parameters, recording, advice
        self._reference_mean = reference_mean
        self._versions = self._version()

    def sample(
        self,
        n: int = 10,
        temperature: Any = 0.9,
        generator: torch.Generator | None = None,
        latents: Sequence[Tensor] | None = None,
        *,
        tile: int | str | None = "auto",
        on_nonfinite: str = "warn",
        project: bool = False,
        progress: Progress | None = None,
        first: int = 0,
    ) -> Tensor:
        """n images (B, n, 3, sH, sW) of each LR image, clipped to [0, 1].

        Args:
            n: As for `NCSR.sample`, as all others.
            temperature: Of the latents.
            generator: Of the model's device; None is torch's default one.
            latents: Latents (B, n, …) to decode instead of drawn latents, in the order of `encode`.
            tile: LR pixels a side of the tiles that a large image is decoded in; "auto"; or None.
            on_nonfinite: What to do about a sample that blew up.
            project: True: samples are put onto the LR image.
            progress: Is told which part (0, 1] is done.
            first: Number of the first sample in what is said of samples that blew up, where others were drawn before it.

        Raises:
            ValueError: `latents` do not have the shapes for n images of this size; and as for `NCSR.sample`.
        """
        check_count("n", n)
        check_tile(tile)
        heat = temperature_for(temperature, self._levels.config, self.lr)
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, not {on_nonfinite!r}")
        self._check_version()
        with self._recording():
            if latents is None:
                latents, origin = draw(self._levels, self.lr, n, heat, generator), f"at {heat}"
            else:
                latents, origin = self._inputs.sample_latents(latents, self.lr, n), "of the latents given"
            tiles = tiling(tile, progress, self._levels, latents)
            images = self._sampled(latents, heat, generator, on_nonfinite, origin, tiles, first)
            del latents
        images = self._inputs.shown(images, self.lr)
        if not project:
            return images
        from ncsr_fast.consistency import projected  # with the metrics' bicubic, which nothing else here needs

        return projected(images, self.lr, self._inputs.flow.scale)

    @property
    def config(self) -> FlowConfig:
        """The flow."""
        return self._levels.config

    @property
    def prior_mean(self) -> Tensor | None:
        """Mean of the top latent; None where it is zero."""
        return self._levels.condition.prior_mean

    def residual(self, image: Tensor) -> Tensor:
        """What the flow sees of images (B, C, sH, sW): less the base that samples are added to, where there is one."""
        base = enlarged(self.lr, self._inputs.flow)
        return image if base is None else image - base

    def draw(self, n: int = 1, temperature: Any = 0.9, generator: torch.Generator | None = None) -> list[Tensor]:
        """The latents (B, n, …) that `sample` draws with the same arguments."""
        check_count("n", n)
        return draw(self._levels, self.lr, n, temperature_for(temperature, self.config, self.lr), generator)

    def encode(
        self,
        hr: Tensor,
        noise: Tensor | None = None,
        *,
        prior: str | Tensor = "condition",
        tile: int | str | None = None,
    ) -> Encoded:
        """Latents and log-likelihood of the HR images; see `NCSR.encode`."""
        check_tile(tile)
        if isinstance(prior, Tensor):
            if prior.dtype != torch.bool or tuple(prior.shape) != (hr.shape[0],):
                raise ValueError(
                    f"prior must be ({hr.shape[0]},) bool, one for each image, not {tuple(prior.shape)} {prior.dtype}"
                )
        elif prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(map(repr, PRIORS))}, not {prior!r}")
        by_reference = isinstance(prior, Tensor) or prior == "reference"
        if by_reference and self._reference_mean is None:
            raise ValueError("prior='reference' is for flows whose prior has a mean that HR images give, such as LLFlow's")
        self._check_version()
        hr, noise = self._inputs.hr(hr, self.lr), self._inputs.noise(noise, self.lr)
        with self._recording():
            mean = self._levels.condition.prior_mean
            if by_reference and self._reference_mean is not None:
                reference = self._reference_mean(hr)
                if isinstance(prior, Tensor) and mean is not None:
                    mean = torch.where(prior[:, None, None, None], reference, mean)
                else:
                    mean = reference
            tiles = encoding_tiling(tile, self._levels, hr, noise)
            if tiles is None:
                return self._levels.encoded(hr, noise, mean)
            with self._levels.held():
                return with_prior(*tiles.encode(self._levels, hr, noise), mean)

    def log_prob(
        self,
        hr: Tensor,
        noise: Tensor | None = None,
        *,
        prior: str | Tensor = "condition",
        tile: int | str | None = None,
    ) -> Tensor:
        """log p(hr | lr), (B,) in nats; `prior` and `tile` as of `NCSR.encode`."""
        return self.encode(hr, noise, prior=prior, tile=tile).log_likelihood

    def decode(self, latents: Sequence[Tensor], noise: Tensor | None = None, *, tile: int | str | None = None) -> Tensor:
        """The HR images of latents, not clipped; see `NCSR.decode`. One LR image takes latents of any number of samples."""
        check_tile(tile)
        self._check_version()
        latents, noise = self._inputs.latents(latents, self.lr), self._inputs.noise(noise, self.lr)
        with self._recording():
            tiles = tiling(tile, None, self._levels, latents)
            if tiles is None:
                image = self._levels.decode(latents, noise)[0]
            else:
                with self._levels.held():
                    tiles.begin(self._levels, 1)
                    image = tiles.decode(self._levels, latents, noise)
        return self._inputs.cropped(image, self.lr)

    def _sampled(
        self,
        latents: Sequence[Tensor],
        temperature: Temperature,
        generator: torch.Generator | None,
        on_nonfinite: str,
        origin: str,
        tiles: Tiling | None,
        first: int,
    ) -> Tensor:
        """Images (B, n, …) of the padded size, not clipped, after blown-up samples have been handled."""
        watch = on_nonfinite != "ignore"
        images, first_bad = decode_samples(self._levels, latents, watch, tiles)
        if first_bad is None:
            return images
        if not has_memory(first_bad):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} reads values, and there are none here: use on_nonfinite='ignore'")
        found = _origins(self._levels, first_bad)
        if not found:
            return images
        message = _explained(found, first_bad, origin, self._advice(self.lr), first)
        if on_nonfinite == "raise":
            raise NonFiniteSamples(message)
        if on_nonfinite == "retry":
            return self._drawn_again(images, found, temperature, generator, message, tiles)
        warn_caller(message)
        return images

    def _drawn_again(
        self,
        images: Tensor,
        found: dict[tuple[int, int], Origin],
        temperature: Temperature,
        generator: torch.Generator | None,
        message: str,
        tiles: Tiling | None,
    ) -> Tensor:
        """`images` with those in `found` drawn again at lower temperatures, at most four times; gives a warning."""
        images, left = images.clone(), list(found)
        for retry in range(1, RETRIES + 1):
            cooler = temperature.cooled(COOLING**retry)
            for image in sorted({image for image, _ in left}):
                samples = [sample for other, sample in left if other == image]
                levels, lr = self._levels.image(image), self.lr[image : image + 1]
                latents = draw(levels, lr, len(samples), cooler.image(image), generator)
                drawn, first_bad = decode_samples(levels, latents, True, tiles)
                images[image, samples] = drawn[0]
                still = {} if first_bad is None else _origins(levels, first_bad)
                left = [pair for pair in left if pair[0] != image or (0, samples.index(pair[1])) in still]
            if not left:
                break
        outcome = f"all were drawn again, the last at {cooler}" if not left else f"{len(left)} still did after"
        tail = "." if not left else f" {RETRIES} more draws, the last at {cooler}."
        warn_caller(f"{message} With on_nonfinite='retry' {outcome}{tail}")
        return images

    def _version(self) -> list[int]:
        """PyTorch's counts of changes of the parameters, as far as PyTorch counts them."""
        if traced():
            return []
        return [0 if parameter.is_inference() else parameter._version for parameter in self._parameters()]

    def _check_version(self) -> None:
        if self._version() != self._versions:
            raise RuntimeError("the weights have changed since model.condition(lr): call it again")


def draw(
    levels: Levels, lr: Tensor, n: int, temperature: float | Temperature, generator: torch.Generator | None
) -> list[Tensor]:
    """Latents (B, n, …) of n samples of each LR image, at a temperature: the first m do not depend on n."""
    shapes = levels.config.latent_shapes(*lr.shape[2:])
    latents = draw_latents(shapes, lr.shape[0], n, temperature, lr, generator)
    return around_prior_mean(latents, levels.condition.prior_mean)


def around_prior_mean(latents: list[Tensor], mean: Tensor | None) -> list[Tensor]:
    """Latents (B, n, …) of zero mean, with the mean of the prior added to the top latent; None is zero."""
    return latents if mean is None else [*latents[:-1], latents[-1] + mean[:, None]]


def draw_latents(
    shapes: Sequence[tuple[int, int, int]],
    batch: int,
    n: int,
    temperature: float | Temperature,
    like: Tensor,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Latents (batch, n, *shape) ~ N(0, temperature²), drawn sample by sample: the first m do not depend on n."""
    draws = []
    for _ in range(n):
        own = [torch.randn((batch, *shape), generator=generator, dtype=like.dtype, device=like.device) for shape in shapes]
        draws.append(own)
    factors = temperature.factors if isinstance(temperature, Temperature) else [temperature] * len(shapes)
    # one sample is not copied
    joined = [latents[0][:, None] if n == 1 else torch.stack(latents, dim=1) for latents in zip(*draws)]
    return [factor * latents for factor, latents in zip(factors, joined)]


def decode_samples(
    levels: Levels, latents: Sequence[Tensor], watch: bool, tiles: Tiling | None = None
) -> tuple[Tensor, Tensor | None]:
    """Images (B, n, 3, sH, sW) of latents (B, n, …); with `watch` also `_first_bad` of each, (B, n).

    If n is 1, the images are decoded as one batch. Otherwise the samples of each image form a batch and share its condition.
    Never synchronizes with the host. With `tiles`, in those.
    """
    batch, n = latents[0].shape[:2]
    if n == 1:
        groups, dim = [(levels, [latent[:, 0] for latent in latents])], 1
    else:
        groups, dim = [(levels.image(index), [latent[index] for latent in latents]) for index in range(batch)], 0
    images, first_bad = [], []
    if tiles is not None:
        tiles.begin(groups[0][0], len(groups))
    with levels.held():
        for group, own in groups:
            peaks = Peaks()
            watched = peaks if watch else None
            x = group.decode(own, None, watched)[0] if tiles is None else tiles.decode(group, own, None, watched)
            images.append(x)
            if watch:
                first_bad.append(_first_bad(levels, x, peaks))
    joined = images[0].unsqueeze(dim) if len(images) == 1 else torch.stack(images, dim)
    return joined, torch.stack(first_bad, dim) if watch else None


def _first_bad(levels: Levels, images: Tensor, peaks: Peaks) -> Tensor:
    """For each sample (N,) the number of the first station whose state was beyond the bound or not finite.

    The number after the last station is the image's own, and the one after that means that the sample is sound.

    Args:
        levels: The levels of the flow.
        images: (N, 3, sH, sW).
        peaks: The largest magnitude (N,) of the state at each station, or none where states were not watched.
    """
    stations = sum([level.steps for level in levels.levels])
    finite = images.detach().isfinite().flatten(1).all(dim=1)
    number = stations + finite.to(torch.int64)
    if len(peaks) != stations:
        return number
    bad = ~(torch.stack(peaks) <= STATE_BOUND)  # NaN included
    return torch.where(bad.any(dim=0), bad.to(torch.int8).argmax(dim=0), number)


def _origins(levels: Levels, first_bad: Tensor) -> dict[tuple[int, int], Origin]:
    """The origin of every (image, sample) that blew up. Waits for the device."""
    found, order = {}, []
    for index, level in reversed(list(enumerate(levels.levels))):  # the stations, in the order of decoding
        order += [Origin(index, step) for step in reversed(range(level.steps))]
    order.append(Origin(0, 0))
    for image, row in enumerate(first_bad.tolist()):
        for i, number in enumerate(row):
            if number < len(order):
                found[image, i] = order[number]
    return found


def _explained(found: dict[tuple[int, int], Origin], first_bad: Tensor, latents: str, why: str, first: int) -> str:
    """A message about samples that blew up, of those in `first_bad` (B, n), the first of which has the number `first`."""
    (image, i), origin = next(iter(found.items()))
    n = first_bad.shape[1]
    some = "" if first == 0 else f" (number {first})" if n == 1 else f" (numbers {first} to {first + n - 1})"
    return (
        f"{len(found)} of {first_bad.numel()} samples{some} {latents} blew up: their state is not finite or beyond "
        f"±{STATE_BOUND:g}, first in {origin} (image {image}, sample {first + i}). {why}"
    )
