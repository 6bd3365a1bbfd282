"""Images that are no photographs: flat areas, ramps, patterns, noise, text and screenshots, to train with and to test on."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ncsr_fast.checks import check_count
from ncsr_fast.data.images import to_uint8, write_image

_LETTERS = "abcdefghijklmnopqrstuvwxyz      ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()[]{}+-*/=<>_#&@"
_FONT_SIZES = (9, 12, 16, 22, 30, 44)  # pixels
_PERIODS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # pixels, of patterns

_Color = tuple[int, int, int]
_Drawing = Callable[[int, int, random.Random], Tensor]


def _color(drawn: random.Random) -> _Color:
    """A colour: black, white, a grey value, or any of the cube, equally often."""
    grey = drawn.randrange(256)
    return drawn.choice([(0, 0, 0), (255, 255, 255), (grey,) * 3, (grey, drawn.randrange(256), drawn.randrange(256))])


def _tensor(color: _Color) -> Tensor:
    return torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)


def _flat(height: int, width: int, drawn: random.Random) -> Tensor:
    return _tensor(_color(drawn)).expand(3, height, width).contiguous()


def _ramp(height: int, width: int, drawn: random.Random) -> Tensor:
    first, second = _tensor(_color(drawn)).double() / 255, _tensor(_color(drawn)).double() / 255
    down, right = drawn.random(), drawn.random()
    position = down * torch.linspace(0, 1, height).view(-1, 1) + right * torch.linspace(0, 1, width)
    return to_uint8(first + (second - first) * position / max(down + right, 1e-6))


def _checkerboard(height: int, width: int, drawn: random.Random) -> Tensor:
    period = drawn.choice(_PERIODS)
    odd = (torch.arange(height).view(-1, 1) // period + torch.arange(width) // period) % 2 == 1
    return torch.where(odd, _tensor(_color(drawn)), _tensor(_color(drawn)))


def _stripes(height: int, width: int, drawn: random.Random) -> Tensor:
    period, slope = drawn.choice(_PERIODS), drawn.choice([(0, 1), (1, 0), (1, 1), (1, -1), (1, 2)])
    odd = (slope[0] * torch.arange(height).view(-1, 1) + slope[1] * torch.arange(width)) // period % 2 == 1
    return torch.where(odd, _tensor(_color(drawn)), _tensor(_color(drawn)))


def _noise(height: int, width: int, drawn: random.Random) -> Tensor:
    """Uniform noise, or a colour with Gaussian noise; in three channels or in grey."""
    generator = torch.Generator().manual_seed(drawn.getrandbits(63))
    shape = (drawn.choice([1, 3]), height, width)
    if drawn.random() < 0.5:
        image = torch.rand(shape, generator=generator)
    else:
        image = _tensor(_color(drawn)) / 255 + drawn.uniform(0.02, 0.3) * torch.randn(shape, generator=generator)
    return to_uint8(image.expand(3, -1, -1))


def _write_text(canvas: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: _Color, drawn: random.Random) -> None:
    """Fill a box (left, top, right, bottom) with lines of random letters."""
    left, top, right, bottom = box
    size = drawn.choice(_FONT_SIZES)
    font = ImageFont.load_default(size)
    for y in range(top, bottom - size, size + size // 3):
        canvas.text((left, y), "".join(drawn.choices(_LETTERS, k=2 * (right - left) // size)), fill=color, font=font)


def _from_canvas(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)


def _text(height: int, width: int, drawn: random.Random) -> Tensor:
    image = Image.new("RGB", (width, height), _color(drawn))
    _write_text(ImageDraw.Draw(image), (2, 2, width, height), _color(drawn), drawn)
    return _from_canvas(image)


def _screenshot(height: int, width: int, drawn: random.Random) -> Tensor:
    """Windows of a screen: rectangles with a border and lines of text, one over the other."""
    image = Image.new("RGB", (width, height), _color(drawn))
    canvas = ImageDraw.Draw(image)
    for _ in range(drawn.randint(3, 8)):
        left, top = drawn.randrange(width), drawn.randrange(height)
        right, bottom = drawn.randint(left, width), drawn.randint(top, height)
        canvas.rectangle((left, top, right, bottom), fill=_color(drawn), outline=_color(drawn))
        _write_text(canvas, (left + 3, top + 3, right, bottom), _color(drawn), drawn)
    return _from_canvas(image)


_DRAWINGS: dict[str, _Drawing] = {
    "flat": _flat,
    "ramp": _ramp,
    "checkerboard": _checkerboard,
    "stripes": _stripes,
    "noise": _noise,
    "text": _text,
    "screenshot": _screenshot,
}
KINDS = tuple(_DRAWINGS)


def draw(kind: str, height: int, width: int, seed: int | str = 0) -> Tensor:
    """An image of a kind; colours, sizes and texts are random.

    Args:
        kind: One of `KINDS`: flat, ramp, checkerboard, stripes, noise, text, screenshot.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        seed: Of everything random. The same arguments give the same image; that of text depends on Pillow's own font.

    Returns:
        uint8 (3, height, width).

    Raises:
        ValueError: Another kind, or a side below 1.

    Example:
        >>> page = draw("text", 192, 256, seed=3)
    """
    if kind not in _DRAWINGS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if min(height, width) < 1:
        raise ValueError(f"height and width must be 1 or more, not {height} and {width}")
    return _DRAWINGS[kind](height, width, random.Random(f"{seed}/{kind}/{height}x{width}"))


def draw_folder(out: str | os.PathLike, count: int, size: int, seed: int = 0) -> list[Path]:
    """Write square drawings, `count` of every kind, as `KIND-NUMBER.png`: one of the folders that a run trains on.

    Args:
        out: Folder that they are written to.
        count: Of every kind.
        size: Side of an image, in pixels.
        seed: Of everything random.

    Returns:
        The files written.

    Raises:
        ValueError: A count or a size below 1.
        OSError: A file cannot be written.
    """
    check_count("count", count)
    check_count("size", size)
    written = []
    for kind in KINDS:
        for number in range(count):
            path = Path(out) / f"{kind}-{number:02}.png"
            write_image(path, draw(kind, size, size, f"{seed}/{number}"))
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Write a folder of drawings from the command line."""
    parser = argparse.ArgumentParser(prog="python -m ncsr_fast.data.drawings", description="Images that are no photographs.")
    parser.add_argument("out", help="folder that they are written to")
    parser.add_argument("--count", type=int, default=6, help="images of every kind (default: %(default)s)")
    parser.add_argument("--size", type=int, default=192, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        written = draw_folder(arguments.out, arguments.count, arguments.size, arguments.seed)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{len(written)} images in {arguments.out}")


if __name__ == "__main__":
    main()
