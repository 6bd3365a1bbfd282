"""Views as one HTML file: pictures as data URIs, style and script inside, nothing that is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

import torch
from PIL import Image
from torch import Tensor

from ncsr_fast.files import atomic_write
from ncsr_fast.gallery.views import Deviation, Picture, View

# matplotlib's inferno (CC0) at nine places, between which colours are interpolated; its lightness rises evenly
_COLOURS = ("#000004", "#210c4a", "#57106e", "#8a226a", "#bc3754", "#e45a31", "#f98e09", "#f9cb35", "#fcffa4")
_METRICS = {"psnr": ("PSNR", "dB", 2), "ssim": ("SSIM", "", 3), "lr_psnr": ("LR-PSNR", "dB", 2), "lpips": ("LPIPS", "", 3)}
_STRIPS = (  # the kinds of pictures in each strip, and what the strip is called
    (("sample",), "Samples"),
    (("temperature",), "Temperatures of sample 0"),
    (("lr", "bicubic", "original"), "Input and original"),
)
_BETWEEN = " · "  # metrics in a line


def write_page(
    path: str | os.PathLike,
    views: Iterable[View],
    *,
    title: str = "Samples",
    settings: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> int:
    """Write views to an HTML file, atomically, one after the other, so that one at a time is in memory.

    The page needs no server and no network: a browser opens it from its place.

    Args:
        path: The file.
        views: Those of `Viewer.view`; at least one.
        title: Of the page.
        settings: Shown below the title, by their names.
        notes: Shown below them: what holds for all images.

    Returns:
        The number of views.

    Raises:
        ValueError: There is no view.
        OSError: The file cannot be written.
    """
    words = {
        "title": _text(title),
        "settings": "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in (settings or {}).items()
        ),
        "notes": _list(notes),
        "style": _template("page.css"),
        "script": _template("page.js"),
    }
    before, after = Template(_template("page.html")).substitute(words, views="\0").split("\0")
    count = 0
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(before)
        for count, view in enumerate(views, 1):
            file.write(_section(view, count))
        if not count:
            raise ValueError("there is no image to show")
        file.write(after)
    return count


def _template(name: str) -> str:
    return resources.files("ncsr_fast.gallery").joinpath(name).read_text(encoding="utf-8")


def _section(view: View, number: int) -> str:
    """The part of the page about one image."""
    lr = view.pictures[0]
    height, width = lr.pixels.shape[1:]
    large_height, large_width = view.scale * height, view.scale * width
    strips = [_strip(name, number, [p for kind in kinds for p in view.of_kind(kind)]) for kinds, name in _STRIPS]
    if view.deviation is not None:
        strips.append(_deviation_strip(number, view.deviation, len(view.of_kind("sample"))))
    return Template(_template("image.html")).substitute(
        number=number,
        name=_text(view.name),
        size=f"{width}×{height} " + (f"→ {large_width}×{large_height} " if view.scale > 1 else "") + "pixels",
        width=large_width,
        height=large_height,
        left=lr.key,
        strips="".join(strips),
        table=_table(view),
        notes=_list(view.notes),
    )


def _strip(name: str, number: int, pictures: Sequence[Picture]) -> str:
    """A row of pictures to choose from."""
    if not pictures:
        return ""
    thumbs = "".join(_thumb(number, picture, _words(picture.metrics)) for picture in pictures)
    return f'<fieldset class="strip"><legend>{name}</legend><div class="thumbs">{thumbs}</div></fieldset>'


def _thumb(number: int, picture: Picture, values: str) -> str:
    """A picture with the radio button that shows it; the one place where its data is."""
    height, width = picture.pixels.shape[1:]
    below = f"<small>{values.split(_BETWEEN)[0]}</small>" if picture.metrics else ""
    return (
        f'<label class="thumb"><input type="radio" name="right-{number}" value="{picture.key}" data-label="{picture.label}"'
        f' data-values="{values}"{" checked" if picture.key == "sample-0" else ""}>'
        f'<img class="{picture.kind}" src="{data_uri(picture.pixels)}" width="{width}" height="{height}" alt="">'
        f"<span>{picture.label.removeprefix('Temperature ')}</span>{below}</label>"
    )


def _deviation_strip(number: int, deviation: Deviation, n: int) -> str:
    """The map of the standard deviation, with the legend of its colours."""
    values = f"mean {deviation.levels.mean():.1f}{_BETWEEN}largest {deviation.levels.max():.1f} grey levels of 255"
    thumb = _thumb(number, Picture("deviation", "Standard deviation", coloured(deviation), {}), values)
    return (
        f'<fieldset class="strip"><legend>Deviation over {n} samples</legend><div class="thumbs wide">{thumb}'
        f'<div class="legend"><div role="img" aria-label="Black is 0, pale yellow {deviation.top:g} grey levels or more">'
        f'<div class="bar" style="background:linear-gradient(to right,{",".join(_COLOURS)})"></div><div class="ticks">'
        f"<span>0</span><span>{deviation.top / 2:g}</span><span>≥ {deviation.top:g}</span></div></div><p>{values}</p></div>"
        "</div></fieldset>"
    )


def _table(view: View) -> str:
    """The metrics of all pictures, and the means over the samples."""
    rows = [picture for picture in view.pictures if picture.metrics]
    names = [name for name in _METRICS if any(name in picture.metrics for picture in rows)]
    if not names:
        return ""
    samples = view.of_kind("sample")
    lines = [(picture.label, picture.metrics) for picture in rows]
    if len(samples) > 1:
        means = {name: sum(sample.metrics[name] for sample in samples) / len(samples) for name in names}
        place = max(index for index, picture in enumerate(rows) if picture.kind == "sample") + 1
        lines.insert(place, (f"Mean of {len(samples)} samples", means))
    head = "".join(f'<th scope="col">{" ".join(filter(None, _METRICS[name][:2]))}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{_number(metrics[name], name)}</td>" for name in names) + "</tr>"
        for label, metrics in lines
    )
    return (
        f'<details open><summary>Metrics of all pictures</summary><div class="scroll"><table><thead><tr>'
        f'<th scope="col">Picture</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _words(metrics: Mapping[str, float]) -> str:
    """Metrics in a line, with their names and units."""
    named = [(title, _number(metrics[name], name), unit) for name, (title, unit, _) in _METRICS.items() if name in metrics]
    return _BETWEEN.join(" ".join(filter(None, words)) for words in named)


def _number(value: float, name: str) -> str:
    return "∞" if math.isinf(value) else f"{value:.{_METRICS[name][2]}f}"


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>' if lines else ""


def _text(text: str) -> str:
    """Text for HTML, in attributes too; bytes of a file's name that are not UTF-8 become question marks."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def data_uri(pixels: Tensor) -> str:
    """Pixels, uint8 (3, H, W), as the data URI of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def coloured(deviation: Deviation) -> Tensor:
    """The map in colours, uint8 (3, H, W): those of `_COLOURS` from 0 to the top."""
    colours = torch.tensor([[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in _COLOURS]).float()
    position = (deviation.levels / deviation.top).clamp(0, 1) * (len(colours) - 1)
    below = position.floor().long().clamp(max=len(colours) - 2)
    part = (position - below)[..., None]
    return (colours[below] * (1 - part) + colours[below + 1] * part).round().to(torch.uint8).permute(2, 0, 1)
