"""`ncsr-fast gallery`: a page to look at samples on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ncsr_fast.cli._common import (
    Gathered,
    ImageFile,
    add_device,
    add_model,
    add_to_8bit,
    check_file,
    count,
    image_files,
    path,
    pick_device,
    raise_problems,
    recommended_temperature,
    seed,
    temperature,
    tile,
    too_large,
)
from ncsr_fast.cli.evaluate import lpips_or_none

if TYPE_CHECKING:
    from ncsr_fast.gallery import View, Viewer

_N = 6
_TEMPERATURES = [0.0, 0.3, 0.6, 0.9]
HELP = "a page to look at: samples beside LR, bicubic and original, in one HTML file"
EXAMPLE = """\
example:
  ncsr-fast gallery small/ --out page.html
  ncsr-fast gallery small/ --hr-images photos/ --out page.html --n 10 --temperature 0.8 --temperatures 0 0.4 0.8 1
  ncsr-fast gallery --hr-images photos/ --out page.html --crop 96
  ncsr-fast gallery dark.png --out page.html --model llflow-compact

Any browser opens the file from where it is; nothing is loaded from elsewhere. Each image has a divider between any two of LR,
bicubic, samples, temperatures, standard deviation and original, by mouse, touch and keyboard, and metrics: LR-PSNR; with
--hr-images PSNR and SSIM, and LPIPS where the lpips package is installed (its weights, of 233 MB, are downloaded once). The
page says what is missing.

With --hr-images alone the LR images are made by MATLAB bicubic, as `ncsr-fast evaluate` makes them. With both, an LR image and
its original have the same path in their folders, suffix and x4 or x8 aside; two files are a pair whatever their names.

Samples have the numbers and pixels that `ncsr-fast sample` gives them with the same seed and temperature. Pictures are PNG, of
photographs about 2 bytes a pixel. Images whose pictures would be too large for a page are refused: --crop N shows their middle.

Images that cannot be read, do not fit their original or whose samples blow up are named and left out; the exit status is 1."""


class Pair(NamedTuple):
    """The files of an image."""

    name: str
    lr: Path | None
    hr: Path | None

    @property
    def files(self) -> list[Path]:
        """Those that there are."""
        return [file for file in (self.lr, self.hr) if file is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="*", type=path, help="LR or dark images, folders of them, or patterns as 'photos/*.png'")
    parser.add_argument("--hr-images", type=path, help="the originals: a folder, or a file of a single image")
    parser.add_argument("--out", required=True, metavar="HTML", type=path, help="file to write")
    add_model(parser)
    parser.add_argument("--n", type=count, help=f"samples of each image (default: {_N}; 1 at temperature 0)")
    parser.add_argument("--temperature", type=temperature, help="of the samples (default: what the model recommends)")
    parser.add_argument(
        "--temperatures",
        type=temperature,
        nargs="+",
        action=Gathered,
        default=_TEMPERATURES,
        help="of a row of pictures by the latents of the first sample (default: 0 0.3 0.6 0.9)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the latents of each image (default: %(default)s)")
    parser.add_argument(
        "--tile",
        type=tile,
        default="auto",
        metavar="N",
        help="as for `ncsr-fast sample` (default: %(default)s)",
    )
    parser.add_argument(
        "--crop", type=count, metavar="N", help="show the middle N×N LR pixels of larger images (default: whole images)"
    )
    add_to_8bit(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from ncsr_fast import __version__
    from ncsr_fast.gallery import Viewer, write_page
    from ncsr_fast.memory import within_free_memory
    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    device = pick_device(args.device)
    check_file("--out", args.out)
    pairs = _pairs(args.input, args.hr_images)
    check_apart(
        {"--out": [args.out]},
        {"the input": [file for pair in pairs for file in pair.files], "--model": files_of_model(args.model)},
    )
    model = NCSR.from_pretrained(args.model).to(device).eval()
    heat = recommended_temperature(model) if args.temperature is None else args.temperature
    notes: list[str] = []
    network = None if args.hr_images is None else lpips_or_none(device, notes)
    viewer = Viewer(
        model,
        args.n or (_N if heat > 0 else 1),
        heat,
        args.temperatures,
        args.seed,
        tile=None if args.tile == "none" else args.tile,
        to_8bit=args.to_8bit,
        crop=args.crop,
        lpips_network=network,
    )
    if not args.input:
        viewer.check_made()
    _check_sizes(pairs, viewer)
    problems: list[str] = []
    settings = {"model": args.model, **viewer.settings(), "made by": f"ncsr_fast {__version__}"}
    with within_free_memory() if device == "cpu" else contextlib.nullcontext():
        views = _views(pairs, viewer, problems)
        shown = write_page(args.out, views, title=f"Samples of {Path(args.model).name}", settings=settings, notes=notes)
    size = Path(args.out).stat().st_size / 1e6
    print(f"{shown} images × {viewer.n} samples → {args.out} ({size:.1f} MB, 8 bits: {args.to_8bit})")
    raise_problems(problems, len(pairs), "shown")


def _pairs(inputs: Sequence[str], hr_images: str | None) -> list[Pair]:
    """The images to show: LR images, originals, or both."""
    from ncsr_fast.data.images import originals_of

    if not inputs and hr_images is None:
        raise ValueError("give LR images, or --hr-images to make them of")
    lr = image_files(inputs)
    if hr_images is None:
        return [Pair(_name(file), file.path, None) for file in lr]
    if not lr:
        return [Pair(_name(file), None, file.path) for file in image_files([hr_images])]
    originals = Path(hr_images)
    if originals.is_file():
        if len(lr) > 1:
            raise ValueError(
                f"--hr-images: {hr_images!r} is a file, and there are {len(lr)} LR images; give the folder of originals"
            )
        return [Pair(_name(lr[0]), lr[0].path, originals)]
    found = originals_of([file.stem for file in lr], originals)
    return [Pair(_name(file), file.path, original) for file, original in zip(lr, found)]


def _name(file: ImageFile) -> str:
    return str(file.path.name if file.folder is None else file.path.relative_to(file.folder))


def _check_sizes(pairs: Sequence[Pair], viewer: Viewer) -> None:
    """Raise ValueError if pictures would be too large, before any is made; files that cannot be read are told later."""
    from ncsr_fast.data.images import ImageError, image_size

    large: list[str] = []
    for pair in pairs:
        try:
            sides = image_size(pair.files[0])
        except (ImageError, OSError):
            continue
        try:
            viewer.check_size(*(sides if pair.lr else (side // viewer.scale for side in sides)))
        except ValueError as error:
            large.append(f"{str(pair.files[0])!r}: {error}")
    if large:
        others = f" ({len(large) - 1} others as well)" if len(large) > 1 else ""
        raise ValueError(f"{large[0]}, by --crop {viewer.largest_side}{others}")


def _views(pairs: Sequence[Pair], viewer: Viewer, problems: list[str]) -> Iterator[View]:
    """The views of images, one after the other; a line is added to `problems` for each that cannot be shown.

    Raises as `raise_problems` does where there is none.
    """
    from tqdm import tqdm

    from ncsr_fast.data.images import ImageError, read_image
    from ncsr_fast.flow.samples import NonFiniteSamples
    from ncsr_fast.memory import is_out_of_memory
    from ncsr_fast.warn import warnings_about

    for pair in tqdm(pairs, unit="image", disable=len(pairs) < 2):
        files = " and ".join(repr(str(file)) for file in pair.files)
        try:
            lr, hr = (None if file is None else read_image(file) for file in (pair.lr, pair.hr))
            with warnings_about(pair.files[0]):
                view = viewer.view(pair.name, lr, hr)
        except (ImageError, FileNotFoundError) as error:
            problems.append(str(error))
        except (ValueError, NonFiniteSamples) as error:
            problems.append(f"{files}: {error}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problems.append(too_large(pair.files[0], viewer.n))
        else:
            yield view
    if len(problems) == len(pairs):
        raise_problems(problems, len(pairs), "shown")
