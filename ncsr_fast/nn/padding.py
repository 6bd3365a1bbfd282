"""Any image size: the flow halves an LR image once, so odd sizes are padded by one LR pixel and cropped back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_to_even(image: Tensor, cell: int = 1) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right to a multiple of 2·cell; the same tensor if it is one already.

    `cell` is the number of pixels of `image` to an LR pixel: 1 for the LR image, `scale` for the HR image and
    its noise, so that a padded pair stays a pair. By reflection, or by replication along an axis that is a
    single LR pixel long, which has nothing to reflect.
    """
    for axis, pad in ((-1, (0, cell, 0, 0)), (-2, (0, 0, 0, cell))):
        size = image.shape[axis]
        if size % (2 * cell):
            image = F.pad(image, pad, mode="reflect" if size > cell else "replicate")
    return image
