"""From a photograph to what a model reads of it, and to the model's images of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ncsr_fast.checks import check_image, check_seed
from ncsr_fast.data.images import to_float
from ncsr_fast.data.low_light import Margins, crop_margins, low_light_input, pad_mirrored
from ncsr_fast.metrics.fidelity import to_uint8
from ncsr_fast.model import NCSR


def is_low_light(model: NCSR) -> bool:
    """True for a model that makes dark photographs bright (LLFlow's)."""
    return getattr(model.encoder, "reference_prior_mean", None) is not None


def photograph_input(model: NCSR, photo: Tensor) -> tuple[Tensor, Margins]:
    """What a model reads of a photograph, and the margins that its images have more than the photograph.

    Args:
        model: Of RGB images.
        photo: uint8 (3, H, W), of any size.

    Returns:
        lr, (1, 3, H, W) in [0, 1] without margins; of a low-light model (1, 6, H', W'), by `pad_mirrored` and `low_light_input`
        as LLFlow's program for unpaired images makes it. Of the model's dtype and device.

    Example:
        >>> lr, margins = photograph_input(model, read_image("dark.png"))
        >>> bright = crop_margins(model.sample(lr, n=1, temperature=0.0)[0, 0], margins)
    """
    like = next(model.parameters())
    if not is_low_light(model):
        return to_float(photo)[None].to(like), Margins(0, 0, 0, 0)
    padded, margins = pad_mirrored(photo)
    return low_light_input(padded.to(like.device))[None].to(like), margins


@torch.inference_mode()
def sample_photograph(
    model: NCSR,
    image: Tensor,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    tile: int | str | None = "auto",
) -> Tensor:
    """n images (n, C, sH, sW) in [0, 1] of a photograph: the samples that `ncsr-fast sample` draws with the same seed.

    For programs whose images are floats. A pixel that is not finite is 0; `NCSR.sample` has warned of it by then.

    Args:
        model: Of RGB or grey images.
        image: Floats in [0, 1], (C, H, W), of any size and dtype. Low-light models read the nearest of 256 levels.
        n: Samples.
        temperature: As for `NCSR.sample`.
        seed: Of the latents, from 0 to 2⁶⁴ - 1.
        tile: As for `NCSR.sample`.

    Raises:
        ValueError, TypeError: As `NCSR.sample` does, also of an image for a low-light model.
    """
    check_seed(seed)
    like = next(model.parameters())
    if is_low_light(model):
        check_image("image", image[None].to(like), like, model.flow.channels)
        lr, margins = photograph_input(model, to_uint8(image.float(), "round"))
    else:
        lr, margins = image[None].to(like), Margins(0, 0, 0, 0)
    samples = model.sample(lr, n, temperature, torch.Generator(like.device).manual_seed(seed), tile)[0]
    return crop_margins(samples, margins).nan_to_num(0).to(image.dtype)
