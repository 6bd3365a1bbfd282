"""The latent space as a tool (Lugmayr et al. 2020): images between two, content put in, detail restored, a part redrawn.

Latents are those of one image each, as `encode` returns them: of every split and the top one, (B, C, h, w). The functions on
latents alone change a list of them; those that take a flow, `model.condition(lr)`, return images in [0, 1].

Example:
    >>> flow = model.condition(lr)
    >>> latents = flow.encode(hr).latents
    >>> image = redraw(flow, latents, box_mask(lr, top=10, left=20, height=8, width=8), temperature=0.8)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ncsr_fast.checks import check_temperature
from ncsr_fast.consistency import projected
from ncsr_fast.flow.samples import ConditionedFlow, around_prior_mean, draw_latents

_PARALLEL = 1e-4  # the sine of an angle below which two latents are interpolated along the chord: the error is its square


def interpolate(first: Sequence[Tensor], second: Sequence[Tensor], weight: float | Sequence[float]) -> list[Tensor]:
    """Latents between two, on the arc that leads from the first to the second: spherical interpolation, image by image.

    The norms between are between the norms of the two: what is drawn at a temperature stays at that temperature, where the mean
    of two is an image too smooth.

    Args:
        first: Latents (B, …).
        second: As many, of the same shapes.
        weight: 0 is the first, 1 the second; a number, or one for each latent, the coarsest last.

    Raises:
        ValueError: Other shapes, or another number of weights.
    """
    weights = [weight] * len(first) if isinstance(weight, (int, float)) else list(weight)
    if len(weights) != len(first):
        raise ValueError(f"weight must be one number, or {len(first)}, one of each latent, not {len(weights)}")
    shapes, others = ([tuple(latent.shape) for latent in latents] for latents in (first, second))
    if shapes != others:
        raise ValueError(f"the latents must have the same shapes, not {shapes} and {others}")
    return [_slerp(*pair) for pair in zip(first, second, weights)]


def normalize(
    latents: Sequence[Tensor],
    temperature: float | Sequence[float] = 1.0,
    masks: Sequence[Tensor] | None = None,
    *,
    window: int | None = None,
    prior_mean: Tensor | None = None,
) -> list[Tensor]:
    """Latents scaled to the magnitude that those of a sample have: their root mean square is the temperature.

    The latents of an image that no sample looks like are too small where it is too smooth, and too large where it has detail
    that does not belong to the LR image. Their pattern stays.

    Args:
        latents: (B, C, h, w) each.
        temperature: A number, or one for each latent.
        masks: One for each latent, from `latent_masks`: only the latents in them are changed, and only they are measured. None:
            all.
        window: Side, odd, of the window of latent pixels in which the root mean square is taken; None: that of all, by image.
        prior_mean: Mean of the top latent's prior, `Encoded.prior_mean`.

    Raises:
        ValueError: An even window, or another number of temperatures.
    """
    temperatures = [temperature] * len(latents) if isinstance(temperature, (int, float)) else list(temperature)
    if len(temperatures) != len(latents):
        raise ValueError(f"temperature must be one number, or {len(latents)}, one of each latent, not {len(temperatures)}")
    for value in temperatures:
        check_temperature(value)
    if window is not None and (window < 1 or window % 2 == 0):
        raise ValueError(f"window must be an odd number of latent pixels, not {window!r}")
    whitened = list(latents) if prior_mean is None else [*latents[:-1], latents[-1] - prior_mean]
    found = []
    everywhere = [torch.ones((), dtype=torch.bool, device=z.device) for z in latents]
    for z, value, inside in zip(whitened, temperatures, everywhere if masks is None else masks):
        scale = value / _root_mean_square(z, inside, window)
        found.append(torch.where(inside, z * scale, z))
    return found if prior_mean is None else [*found[:-1], found[-1] + prior_mean]


def redrawn(
    latents: Sequence[Tensor],
    masks: Sequence[Tensor],
    temperature: float = 0.9,
    generator: torch.Generator | None = None,
    *,
    prior_mean: Tensor | None = None,
) -> list[Tensor]:
    """Latents with new ones, of a temperature, in masks from `latent_masks`, and the others as they are."""
    check_temperature(temperature)
    shapes = [(latent.shape[1], latent.shape[2], latent.shape[3]) for latent in latents]
    drawn = draw_latents(shapes, latents[0].shape[0], 1, temperature, latents[0], generator)
    new = [latent[:, 0] for latent in around_prior_mean(drawn, prior_mean)]
    return [torch.where(inside, own, z) for inside, own, z in zip(masks, new, latents)]


def images_of(flow: ConditionedFlow, latents: Sequence[Tensor]) -> Tensor:
    """The images (B, C, sH, sW) in [0, 1] of latents (B, …), one of each LR image."""
    return flow.sample(1, latents=[latent[:, None] for latent in latents])[:, 0]


def redraw(
    flow: ConditionedFlow,
    latents: Sequence[Tensor],
    mask: Tensor,
    temperature: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The image of latents whose part in a mask is drawn anew: (B, C, sH, sW).

    Far outside of the mask the image stays as it is; near it, it changes as far as the flow's networks reach.

    Args:
        flow: Conditioned on the LR images.
        latents: Of an image, `flow.encode(hr).latents`, or drawn.
        mask: (B or 1, 1, H, W) of LR pixels.
        temperature: Of the new latents.
        generator: Of the flow's device.
    """
    masks = latent_masks(flow, mask)
    return images_of(flow, redrawn(latents, masks, temperature, generator, prior_mean=flow.prior_mean))


def restore(
    flow: ConditionedFlow, image: Tensor, temperature: float | Sequence[float] = 0.9, *, window: int | None = None
) -> Tensor:
    """An image (B, C, sH, sW) of the LR images that is too smooth, with the detail that its latents ask for too faintly.

    It is encoded, and its latents are normalized: the flow gives every pattern the strength that it has in photographs.

    Args:
        flow: Conditioned on the LR images of the image.
        image: What another method made of them: an enlargement, the output of a network trained with L1, a denoised photograph.
        temperature: Of the result.
        window: As for `normalize`: small windows give detail to what is smooth beside what is not.
    """
    encoded = flow.encode(flow.residual(image), tile="auto")
    return images_of(flow, normalize(encoded.latents, temperature, window=window, prior_mean=encoded.prior_mean))


def transfer(
    flow: ConditionedFlow,
    pasted: Tensor,
    mask: Tensor,
    temperature: float | Sequence[float] = 0.9,
    *,
    project: bool = False,
) -> Tensor:
    """An image into which something was pasted, made to belong there: (B, C, sH, sW).

    What was pasted is encoded given the LR image, which does not know of it, so that its latents are improbably large; in the
    mask they are normalized to those of a sample.

    Args:
        flow: Conditioned on the LR images.
        pasted: (B, C, sH, sW), for instance by `paste`.
        mask: (B or 1, 1, H, W): the LR pixels of what was pasted.
        temperature: Of the latents in the mask.
        project: True: what was pasted is put onto the LR image first (`ncsr_fast.consistency`), so that its detail comes along
            where its colours do not.
    """
    if project:
        pasted = projected(pasted, flow.lr, flow.config.scale)
    masks, encoded = latent_masks(flow, mask), flow.encode(flow.residual(pasted), tile="auto")
    return images_of(flow, normalize(encoded.latents, temperature, masks, prior_mean=encoded.prior_mean))


def paste(image: Tensor, content: Tensor, top: int, left: int) -> Tensor:
    """An image (…, C, H, W) with the content (…, C, h, w) at a place; ValueError where it does not fit in."""
    height, width = content.shape[-2:]
    if not (0 <= top <= image.shape[-2] - height and 0 <= left <= image.shape[-1] - width):
        raise ValueError(
            f"what is pasted, {width}×{height} pixels at row {top} and column {left}, must lie in the image, "
            f"{image.shape[-1]}×{image.shape[-2]}"
        )
    found = image.clone()
    found[..., top : top + height, left : left + width] = content
    return found


def box_mask(lr: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A mask (1, 1, H, W) of a box of LR pixels; ValueError where it is empty or not in the image."""
    if min(top, left) < 0 or min(height, width) < 1 or top + height > lr.shape[-2] or left + width > lr.shape[-1]:
        raise ValueError(
            f"the box of {width}×{height} LR pixels at row {top} and column {left} must lie in the LR image, "
            f"{lr.shape[-1]}×{lr.shape[-2]}"
        )
    mask = torch.zeros(1, 1, *lr.shape[-2:], dtype=torch.bool, device=lr.device)
    mask[..., top : top + height, left : left + width] = True
    return mask


def latent_masks(flow: ConditionedFlow, mask: Tensor) -> list[Tensor]:
    """The mask (B or 1, 1, h, w) of each latent: of those pixels that share an LR pixel with `mask`, (B or 1, 1, H, W)."""
    batch, _, height, width = flow.lr.shape
    if not isinstance(mask, Tensor) or mask.dim() != 4 or len(mask) not in (1, batch) or mask.shape[1:] != (1, height, width):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape ({batch} or 1, 1, {height}, {width}), that of lr, not {shape}")
    missing = [-side % flow.config.lr_multiple for side in (width, height)]
    padded = F.pad(
        mask.to(flow.lr.dtype), (0, missing[0], 0, missing[1]), mode="replicate"
    )  # its latents are seen at the border
    return [F.interpolate(padded, size=shape[1:], mode="area") > 0 for shape in flow.config.latent_shapes(height, width)]


def _slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    a, b = first.flatten(1), second.flatten(1)
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(dim=1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    straight = (sine < _PARALLEL) | (norms == 0)
    divisor = torch.where(straight, 1.0, sine)
    shape = (-1, *[1] * (first.dim() - 1))
    parts = [
        torch.where(straight, part, torch.sin(part * angle) / divisor).view(shape) for part in (1.0 - weight, float(weight))
    ]
    return parts[0] * first + parts[1] * second


def _root_mean_square(z: Tensor, inside: Tensor, window: int | None) -> Tensor:
    """Of the latents in a mask, (B, 1, 1, 1), or of those in a window around each pixel too, (B, 1, h, w)."""
    weight = inside.to(z.dtype).expand(z.shape[0], 1, *z.shape[2:])
    square = z.square().mean(dim=1, keepdim=True) * weight
    if window is None:
        total, count = (part.sum(dim=(1, 2, 3), keepdim=True) for part in (square, weight))
    else:
        total, count = (F.avg_pool2d(part, window, 1, window // 2) for part in (square, weight))
    return (total / count.clamp_min(torch.finfo(z.dtype).tiny)).sqrt().clamp_min(torch.finfo(z.dtype).tiny)
