"""From the bytes of a photograph to what a model reads of it."""

from __future__ import annotations

from torch import Tensor

from ncsr_fast.data.images import to_float
from ncsr_fast.data.low_light import Margins, low_light_input, pad_mirrored
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
