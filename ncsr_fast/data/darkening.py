"""Photographs made dark, as training pairs for low-light models where no real ones are at hand."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ncsr_fast.data.images import list_images, read_image, to_float, to_uint8, write_image

GAMMA, GAIN, NOISE = (1.8, 3.2), (0.4, 0.8), (0.002, 0.012)  # ranges of `darken`'s arguments in a folder


def darken(image: Tensor, gamma: float, gain: float, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """A photograph as an underexposed one: gain · image^gamma, with Gaussian noise, in 8 bits.

    A model of an exposure, not of a camera: no colour cast, no noise that grows with the signal, no blur.

    Args:
        image: uint8 (…, C, H, W).
        gamma: Exponent, above 1: how much more shadows lose than lights.
        gain: Brightness of white.
        noise: Standard deviation of the noise, in units of white.
        generator: Of the noise, on the image's device; None is torch's default one.

    Returns:
        uint8, of the shape of image.

    Raises:
        ValueError: An argument that is negative, or a gamma of zero.

    Example:
        >>> dark = darken(read_image("photo.png"), gamma=2.5, gain=0.6, noise=0.008)
    """
    for name, value, sound in (("gamma", gamma, gamma > 0), ("gain", gain, gain >= 0), ("noise", noise, noise >= 0)):
        if not sound:
            raise ValueError(f"{name} must be {'positive' if name == 'gamma' else '0 or more'}, not {value!r}")
    dark = gain * to_float(image).pow(gamma)
    return to_uint8(dark + noise * torch.randn(dark.shape, generator=generator, device=dark.device))


def darken_folder(images: str | os.PathLike, out: str | os.PathLike, seed: int = 0) -> list[Path]:
    """Darken every image of a folder and write it, as PNG and by its name, to another: `images` and `lr_images` of a run.

    Gamma, gain and noise of an image are uniform in `GAMMA`, `GAIN` and `NOISE`; the seed and its name decide them, and the
    noise.

    Args:
        images: Folder of photographs, searched recursively.
        out: Folder that the dark ones are written to.
        seed: Of everything random.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: The folder is not there, or holds no image; or `out` is inside it.
    """
    images, out = Path(images), Path(out)
    if out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"out: {str(out)!r} is in the folder of the photographs, {str(images)!r}; choose another")
    written = []
    for path in list_images(images):
        name = path.relative_to(images).with_suffix(".png")
        drawn = random.Random(f"{seed}/{name.as_posix()}")
        gamma, gain, noise = (drawn.uniform(*bounds) for bounds in (GAMMA, GAIN, NOISE))
        generator = torch.Generator().manual_seed(drawn.getrandbits(63))
        write_image(out / name, darken(read_image(path), gamma, gain, noise, generator))
        written.append(out / name)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Darken a folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m ncsr_fast.data.darkening", description="Darken a folder of photographs.")
    parser.add_argument("images", help="folder of photographs, searched recursively")
    parser.add_argument("out", help="folder that the dark ones are written to")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        written = darken_folder(arguments.images, arguments.out, arguments.seed)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{len(written)} images in {arguments.out}")


if __name__ == "__main__":
    main()
