"""Drawing samples: latents from a generator, many samples an image, and what is done about those that blew up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.engine.conditioning import Features
from ncsr_fast.engine.fused_level import level_decoder
from ncsr_fast.engine.memory import spare_bytes
from ncsr_fast.layout import has_memory
from ncsr_fast.nn.checks import bytes_range

if TYPE_CHECKING:
    from ncsr_fast.nn.ncsr import NCSR

ON_NONFINITE = ("warn", "raise", "ignore", "retry")
STATE_BOUND = 1e4  # actnorms keep a healthy state near unit variance: within ±10
RETRIES, COOLING = 4, 0.8  # of a sample that blew up: how often, and the factor of the temperature each time


class NonFiniteSamples(ArithmeticError):
    """The inverse of the flow exploded: the state of a sample is not finite, or far beyond what the flow was trained on."""


class Origin(NamedTuple):
    """Where the state of a sample was first not finite or beyond the bound."""

    level: int  # from the HR side, 0 first
    step: int  # conditional step in encoding order, 0 first; decoding goes from the last to the first

    def __str__(self) -> str:
        return f"level {self.level + 1}, step {self.step}"


def sample(model: NCSR, lr: Tensor, n: int, temperature: float, generator: torch.Generator | None, on_nonfinite: str) -> Tensor:
    """What `NCSR.sample` documents, of an LR image of even size: images (B, n, 3, sH, sW), not clipped."""
    features, shapes = model.features(lr), model.latent_shapes(*lr.shape[2:])
    latents = draw_latents(shapes, lr.shape[0], n, temperature, lr, generator)
    watch = on_nonfinite != "ignore"
    images, first_bad = decode_samples(model, features, latents, watch)
    if not watch:
        return images
    if not has_memory(first_bad):
        raise ValueError(f"on_nonfinite={on_nonfinite!r} reads values, and there are none here: use on_nonfinite='ignore'")
    found = _origins(model, first_bad)
    if found and on_nonfinite == "raise":
        raise NonFiniteSamples(_explained(found, n * lr.shape[0], temperature, advice(model, lr)))
    if found and on_nonfinite == "warn":
        warnings.warn(_explained(found, n * lr.shape[0], temperature, advice(model, lr)), RuntimeWarning, stacklevel=3)
    if found and on_nonfinite == "retry":
        message = _explained(found, n * lr.shape[0], temperature, advice(model, lr))
        return _drawn_again(model, features, shapes, images, found, temperature, generator, message)
    return images


def advice(model: NCSR, lr: Tensor) -> str:
    """The reason why samples of an LR image (B, 3, H, W) blew up, as far as weights and pixels tell, and advice."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        return (
            f"{len(broken)} weights of the model are not finite, {broken[0]} first, so no temperature helps: load a checkpoint "
            "from before they were."
        )
    if not lr.isfinite().all():
        return "Pixels of lr are not finite."
    values = bytes_range(lr)
    if values:
        return f"lr has values {values}; images are floats in [0, 1]: divide by 255."
    return (
        "Somewhere before, a scale near zero became a divisor: model.check_invertibility(lr) shows where. Try a lower "
        "temperature, or on_nonfinite='retry'."
    )


def draw_latents(
    shapes: Sequence[tuple[int, int, int]],
    batch: int,
    n: int,
    temperature: float,
    like: Tensor,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Latents (batch, n, *shape) ~ N(0, temperature²), drawn sample by sample: the first m do not depend on n."""
    options = {"generator": generator, "dtype": like.dtype, "device": like.device}
    draws = [[torch.randn((batch, *shape), **options) for shape in shapes] for _ in range(n)]
    return [temperature * torch.stack(latents, dim=1) for latents in zip(*draws)]


def decode_samples(model: NCSR, features: list[Features], latents: list[Tensor], watch: bool) -> tuple[Tensor, Tensor | None]:
    """Images (B, n, 3, sH, sW) of latents (B, n, …); with `watch` also where each of them (B, n) blew up, as `_first_bad` says.

    With one sample an image, the images are one batch. Otherwise the samples of an image are, and share what its LR image
    decides. Without a host synchronisation.
    """
    with contextlib.ExitStack() as stack:
        for level in model.levels:
            stack.enter_context(level.cache.held())
        images, peaks = _decode_all(model, features, latents, watch)
        return images, _first_bad(model, images, peaks) if watch else None


def _decode_all(model: NCSR, features: list[Features], latents: list[Tensor], watch: bool) -> tuple[Tensor, list[Tensor]]:
    batch, n = latents[0].shape[:2]
    if model.engine == "plain":
        samples = [model.decode_features([latent[:, i] for latent in latents], features, None)[0] for i in range(n)]
        return torch.stack(samples, dim=1), []
    if n == 1:
        images, peaks = _decode_group(model, features, [latent[:, 0] for latent in latents], watch)
        return images[:, None], [peak[:, None] for peak in peaks]
    groups = []
    for index in range(batch):
        own_features = [Features(*(None if f is None else f[index : index + 1] for f in level)) for level in features]
        groups.append(_decode_group(model, own_features, [latent[index] for latent in latents], watch))
    images = torch.stack([images for images, _ in groups])
    return images, [torch.stack(peak) for peak in zip(*(peaks for _, peaks in groups))]


def _decode_group(model: NCSR, features: list[Features], latents: list[Tensor], watch: bool) -> tuple[Tensor, list[Tensor]]:
    """Images (N, 3, sH, sW) and the peak (N,) of every state on the way to them.

    Level by level: what the samples share exists once, and only while its level is decoded.
    """
    *latents, z = latents
    peaks: list[Tensor] = []
    for index in reversed(range(len(model.levels))):
        level, condition = model.levels[index], features[index]
        latent = latents.pop() if level.split_channels else None
        decode = level_decoder(level, condition, None, model.served)
        together = _samples_at_once(model, index, condition.own) if len(condition.own) == 1 else len(z)
        parts, peaks_of_parts = [], []
        for first in range(0, len(z), together):
            chunk = slice(first, first + together)
            peaks_of_parts.append([] if watch else None)
            parts.append(decode(z[chunk], None if latent is None else latent[chunk], peaks_of_parts[-1])[0])
        z = torch.cat(parts)
        if watch:
            peaks += [torch.cat(peak) for peak in zip(*peaks_of_parts)]
    return z, peaks


def _samples_at_once(model: NCSR, index: int, own: Tensor) -> int:
    """How many samples of an image are decoded together by a level whose features are `own`."""
    if model.options.samples_at_once is not None:
        return model.options.samples_at_once
    channels = 2 * model.config.hidden_channels + 8 * model.levels[index].channels  # hidden layers, outputs and states
    of_sample = channels * own.shape[2] * own.shape[3] * own.element_size()
    return max(1, spare_bytes(own.device) // of_sample)


# -- samples that blew up ----------------------------------------------------------------------------------------


def _stations(model: NCSR) -> list[Origin]:
    """The steps in the order they are decoded in."""
    levels = reversed(list(enumerate(model.levels)))
    return [Origin(index, step) for index, level in levels for step in reversed(range(level.steps))]


def _first_bad(model: NCSR, images: Tensor, peaks: list[Tensor]) -> Tensor:
    """For each sample (B, n) the number of the station whose state was the first beyond the bound or not finite.

    The number after the last station's is the image's own, and the next one means none.
    """
    of_image = ~images.detach().isfinite().flatten(2).all(dim=2)
    bad = [~(peak <= STATE_BOUND) for peak in peaks]  # NaN included
    bad += [torch.zeros_like(of_image)] * (len(_stations(model)) - len(bad))  # of states that were not watched
    return torch.stack([*bad, of_image, torch.ones_like(of_image)]).to(torch.int8).argmax(dim=0)


def _origins(model: NCSR, first_bad: Tensor) -> dict[tuple[int, int], Origin]:
    """Of every (image, sample) that blew up, where. Waits for the device."""
    order = [*_stations(model), Origin(0, 0)]
    numbered = ((image, i, number) for image, row in enumerate(first_bad.tolist()) for i, number in enumerate(row))
    return {(image, i): order[number] for image, i, number in numbered if number < len(order)}


def _explained(found: dict[tuple[int, int], Origin], total: int, temperature: float, why: str) -> str:
    (image, i), origin = next(iter(found.items()))
    return (
        f"{len(found)} of {total} samples at temperature {temperature:g} blew up: their state is not finite or beyond "
        f"±{STATE_BOUND:g}, first in {origin} (image {image}, sample {i}). {why}"
    )


def _drawn_again(
    model: NCSR,
    features: list[Features],
    shapes: Sequence[tuple[int, int, int]],
    images: Tensor,
    found: dict[tuple[int, int], Origin],
    temperature: float,
    generator: torch.Generator | None,
    message: str,
) -> Tensor:
    """`images` with those of `found` drawn again, cooler each time, until they are sound or four times; warns either way."""
    images, left = images.clone(), list(found)
    for _ in range(RETRIES):
        temperature *= COOLING
        for image in sorted({image for image, _ in left}):
            samples = [i for of, i in left if of == image]
            own_features = [Features(*(None if f is None else f[image : image + 1] for f in level)) for level in features]
            latents = draw_latents(shapes, 1, len(samples), temperature, images, generator)
            drawn, first_bad = decode_samples(model, own_features, latents, True)
            images[image, samples] = drawn[0]
            still = _origins(model, first_bad)
            left = [pair for pair in left if pair[0] != image or (0, samples.index(pair[1])) in still]
        if not left:
            break
    outcome = f"all were drawn again, the last at temperature {temperature:g}" if not left else f"{len(left)} still did after"
    tail = "." if not left else f" {RETRIES} more draws, the last at temperature {temperature:g}."
    warnings.warn(f"{message} With on_nonfinite='retry' {outcome}{tail}", RuntimeWarning, stacklevel=4)
    return images
