"""Images as LLFlow reads and writes them (Wang et al. 2022): its input, its test programs' padding and brightness."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ncsr_fast.data.images import to_float

_DARKEST = 1e-3  # added to an image before its logarithm
_GREY = (0.114, 0.587, 0.299)  # weights of red, green and blue: those of the luma, in the wrong order


class Margins(NamedTuple):
    """Pixels that a padded image has more on each side."""

    top: int
    bottom: int
    left: int
    right: int


def low_light_input(low: Tensor, equalized: Tensor | None = None) -> Tensor:
    """The six channels that LLFlow's encoder reads: log(low + 1e-3) of images in [0, 1], then the images equalized.

    The same bits on every device, since logarithms are rounded once, from float64.

    Args:
        low: Low-light images, uint8 RGB (…, 3, H, W).
        equalized: The same by `equalize`; of crops, what is cut out of the whole image's. None: computed here, which waits for
            a GPU.

    Returns:
        float32 (…, 6, H, W).

    Raises:
        TypeError, ValueError: An image is not uint8, or not of three channels, or the two differ in shape.

    Example:
        >>> padded, margins = pad_mirrored(read_image("dark.png"))
        >>> bright = model.sample(low_light_input(padded)[None], n=1)[0, 0]
        >>> write_image("bright.png", to_uint8(crop_margins(bright, margins), "truncate"))
    """
    _check("low", low)
    if equalized is None:
        equalized = equalize(low)
    _check("equalized", equalized)
    if equalized.shape != low.shape:
        raise ValueError(f"equalized must have the shape of low, {tuple(low.shape)}, not {tuple(equalized.shape)}")
    logarithm = (to_float(low) + _DARKEST).double().log().float()
    return torch.cat([logarithm, to_float(equalized)], dim=-3)


def equalize(image: Tensor) -> Tensor:
    """Equalize the histogram of each channel of each image, uint8 (…, C, H, W), as OpenCV does.

    With c(v) the number of pixels ≤ v, v₀ the darkest value that there is and N the number of pixels, v becomes
    round((c(v) - c(v₀)) · 255 / (N - c(v₀))), the factor in float32, halves to even. A channel of one value stays as it is.
    """
    _check_bytes("image", image)
    if image.numel() == 0:
        return image.clone()
    planes = image.reshape(-1, image.shape[-2] * image.shape[-1]).long()
    count, pixels = planes.shape
    row = 256 * torch.arange(count, device=image.device)[:, None]
    histogram = torch.bincount((planes + row).flatten(), minlength=256 * count).view(count, 256)
    darkest = histogram.gather(1, histogram.gt(0).int().argmax(dim=1, keepdim=True))
    below = (histogram.cumsum(dim=1) - darkest).clamp(min=0).float()
    factor = 255 / (pixels - darkest).float()
    table = torch.where(darkest == pixels, torch.arange(256, device=image.device), (below * factor).round())
    return table.to(torch.uint8).gather(1, planes).view(image.shape)


def pad_mirrored(image: Tensor, multiple: int = 16) -> tuple[Tensor, Margins]:
    """An image padded on all sides to multiples of `multiple`, by mirroring with the pixels of the edge; and the margins.

    As the published program for unpaired images does: a side that is such a multiple already becomes a whole `multiple` longer,
    and the smaller half comes first. Pad before the histogram is equalized, and undo it by `crop_margins`.

    Args:
        image: (…, H, W).
        multiple: Of the sides; the published 16, and at least 8 for the flow.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, not {multiple!r}")
    margins = []
    for side in image.shape[-2:]:
        missing = multiple - side % multiple
        margins += [missing // 2, missing - missing // 2]
    return _padded(image, Margins(*margins), edge=True), Margins(*margins)


def pad_to_even(image: Tensor) -> tuple[Tensor, Margins]:
    """An image padded at the bottom and right to even sides, by mirroring without the pixels of the edge; and the margins.

    As the published program for paired images does, whose flow then takes sides that are multiples of 8 alone.
    """
    margins = Margins(0, image.shape[-2] % 2, 0, image.shape[-1] % 2)
    return _padded(image, margins, edge=False), margins


def crop_margins(image: Tensor, margins: Margins) -> Tensor:
    """A padded image (…, H, W) without its margins."""
    height, width = image.shape[-2:]
    return image[..., margins.top : height - margins.bottom, margins.left : width - margins.right]


def match_brightness(image: Tensor, reference: Tensor) -> Tensor:
    """Images made as bright as their references: what LLFlow's PSNR on paired images is measured after.

    image · mean(grey(reference)) / mean(image), where grey is 0.114 R + 0.587 G + 0.299 B, the program's weights. The reference
    is what a photographer does not have: say so of any number that comes of it.

    Args:
        image: Decoded images, not clipped (…, 3, H, W).
        reference: Of their shape, in [0, 1].

    Returns:
        Of the shape of image, not clipped.
    """
    if image.shape != reference.shape or image.dim() < 3 or image.shape[-3] != 3:
        raise ValueError(
            f"image and reference must have the same shape (…, 3, H, W), not {tuple(image.shape)} and {tuple(reference.shape)}"
        )
    weights = reference.new_tensor(_GREY)[:, None, None]
    brightness = (reference * weights).sum(dim=-3, keepdim=True).mean(dim=(-2, -1), keepdim=True)
    return image * (brightness / image.mean(dim=(-3, -2, -1), keepdim=True))


def _padded(image: Tensor, margins: Margins, edge: bool) -> Tensor:
    for dim, before, after in ((-2, margins.top, margins.bottom), (-1, margins.left, margins.right)):
        image = image.index_select(dim, _mirrored(image.shape[dim], before, after, edge).to(image.device))
    return image


def _mirrored(side: int, before: int, after: int, edge: bool) -> Tensor:
    """Where each pixel of a padded axis comes from; `edge`: the first and last pixel of the axis are mirrored too."""
    last = 2 * side - 1 if edge else 2 * side - 2
    places = torch.arange(-before, side + after) % max(last + edge, 1)
    return torch.minimum(places, last - places)


def _check(name: str, image: Tensor) -> None:
    _check_bytes(name, image)
    if image.shape[-3] != 3:
        raise ValueError(f"{name} must have shape (…, 3, H, W), not {tuple(image.shape)}")


def _check_bytes(name: str, image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        found = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{name} must be a tensor of uint8, as ncsr_fast.data.read_image returns it, not {found}")
    if image.dim() < 3:
        raise ValueError(f"{name} must have shape (…, C, H, W), not {tuple(image.shape)}")
