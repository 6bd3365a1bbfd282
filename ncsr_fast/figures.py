"""Pictures for people: tiles with captions, and heat maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ncsr_fast.files import atomic_write
from ncsr_fast.metrics.fidelity import to_uint8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP, _CAPTION, _TEXT = 4, 22, 15  # pixels
_INK, _PAPER = (32, 32, 32), (255, 255, 255)
# Dark to light through purple and orange: readable in grey and by colour-blind eyes.
_HEAT = (
    torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=torch.float32, device="cpu")
    / 255
)


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int) -> None:
    """Write a matplotlib figure atomically, in the format of the suffix of `path`, or as PNG without a suffix.

    Raises:
        ValueError: Matplotlib cannot write this format.
    """
    path = Path(path)
    kind = path.suffix[1:].lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(
            f"{str(path)!r}: plots cannot be written as {path.suffix}; end the name in one of .{', .'.join(sorted(known))}"
        )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=kind)


def heat_map(values: Tensor, top: float) -> Tensor:
    """Colours (3, H, W) in [0, 1] of values (H, W) from 0 to `top`."""
    place = (values.float() / top).clamp(0, 1) * (len(_HEAT) - 1)
    low = place.floor().long().clamp(max=len(_HEAT) - 2)
    weight = (place - low)[..., None]
    return ((1 - weight) * _HEAT[low] + weight * _HEAT[low + 1]).permute(2, 0, 1)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Tensor]]], columns: Sequence[str]) -> Image.Image:
    """A picture of rows of equally large tiles (3, H, W) in [0, 1], with titles above rows and columns."""
    font = ImageFont.load_default(size=_TEXT)
    height, width = rows[0][1][0].shape[1:]
    across = _GAP + len(columns) * (width + _GAP)
    sheet = Image.new("RGB", (across, _CAPTION + len(rows) * (height + _CAPTION + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((_GAP + column * (width + _GAP), 2), title, fill=_INK, font=font)
    top = _CAPTION
    for title, tiles in rows:
        for column, tile in enumerate(tiles):
            array = to_uint8(tile).permute(1, 2, 0).cpu().numpy()
            sheet.paste(Image.fromarray(np.ascontiguousarray(array)), (_GAP + column * (width + _GAP), top))
        draw.text((_GAP, top + height + 1), title, fill=_INK, font=font)
        top += height + _CAPTION + _GAP
    return sheet
