"""`ncsr-fast evaluate`: measure a model on photographs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import (
    Gathered,
    add_device,
    add_model,
    check_file,
    count,
    path,
    pick_device,
    raise_problems,
    seed,
    temperature,
    too_large,
)

if TYPE_CHECKING:
    from ncsr_fast.evaluation import Evaluation, Scores

_MULTIPLE = 8  # the sides of HR images are multiples of this number, whatever the scale
HELP = "measure a model and bicubic on a folder of HR images"
EXAMPLE = """\
example:
  ncsr-fast evaluate photos/ --temperatures 0 0.5 0.8 --n 10 --json scores.json

The table shows means over images of PSNR, SSIM, LR-PSNR (mean, and the worst of each image's samples) and diversity; if the
lpips package and its weights are installed, also LPIPS and the NTIRE diversity score. HR images are cropped to multiples of 8,
and LR images are made by MATLAB bicubic. With --lr-images, HR images are cropped to fit the given LR images.

If an image cannot be read, does not fit its LR image or does not fit in memory, a message names it, the means are those of the
other images, and the exit status is 1. In the JSON file, infinite values (the PSNR of equal images) and NaN are null."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=path, help="folder of HR images, searched recursively")
    parser.add_argument("--lr-images", type=path, help="folder of the LR images (default: made by MATLAB bicubic)")
    add_model(parser)
    parser.add_argument("--n", type=count, default=10, help="samples of each image above temperature 0 (default: %(default)s)")
    parser.add_argument(
        "--temperatures",
        type=temperature,
        nargs="+",
        action=Gathered,
        default=[0.0, 0.5, 0.8],
        help="temperatures of the samples (default: 0 0.5 0.8)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the latents of each image (default: %(default)s)")
    parser.add_argument("--limit", type=count, help="use only this number of images, from the first on")
    parser.add_argument("--json", type=path, help="also write the means and every image's values to this file")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ncsr_fast.evaluation import Evaluation, table
    from ncsr_fast.memory import within_free_memory
    from ncsr_fast.metrics.perceptual import LPIPSUnavailable, lpips_model
    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    device = pick_device(args.device)
    if args.json:
        check_file("--json", args.json)
        read = {"the images": [args.images], "--lr-images": [args.lr_images] if args.lr_images else []}
        check_apart({"--json": [args.json]}, {**read, "--model": files_of_model(args.model)})
    pairs = _pairs(args)
    model = NCSR.from_pretrained(args.model).to(device).eval()
    try:
        network = lpips_model(device=device)
    except LPIPSUnavailable as error:
        network = None
        print(f"without LPIPS: {error}", file=sys.stderr)
    evaluation = Evaluation(model, args.temperatures, args.n, args.seed, network)
    measured: list[Path] = []
    problems: list[str] = []
    with within_free_memory() if device == "cpu" else contextlib.nullcontext():
        for hr, lr in tqdm(pairs, unit="image"):
            problem = _add(evaluation, hr, lr, args.n)
            if problem is None:
                measured.append(hr)
            else:
                problems.append(problem)
    if measured:
        print(f"{args.model}, {len(measured)} images, {args.n} samples each, {device}")
        print(table(evaluation.scores))
        if args.json:
            _write(args.json, [str(hr.relative_to(args.images)) for hr in measured], evaluation.scores)
    raise_problems(problems, len(pairs), "measured")


def _pairs(args: argparse.Namespace) -> list[tuple[Path, Path | None]]:
    """The first HR images, each with its LR image if LR images are given."""
    from ncsr_fast.data.images import list_images, pair_up

    images = list_images(args.images)
    if args.lr_images is None:
        return [(image, None) for image in images][: args.limit]
    return pair_up(images, Path(args.images), list_images(args.lr_images), Path(args.lr_images))[: args.limit]


def _add(evaluation: Evaluation, hr: Path, lr: Path | None, n: int) -> str | None:
    """Measure an image; return the reason if it cannot be measured, else None."""
    from tqdm import tqdm

    from ncsr_fast.data.images import ImageError, crop_to_multiple, read_image
    from ncsr_fast.memory import is_out_of_memory

    try:
        image, given = read_image(hr), None if lr is None else read_image(lr)
        if lr is None and min(image.shape[-2:]) >= _MULTIPLE:
            image = crop_to_multiple(image, _MULTIPLE)
        try:
            said = evaluation.add(image, given)
        except ValueError as error:
            raise ImageError(f"{' and '.join(repr(str(file)) for file in (hr, lr) if file)}: {error}") from error
    except (ImageError, FileNotFoundError) as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return too_large(hr, n)
    tqdm.write(f"{hr.name}: {said}")
    return None


def _write(file: str, names: list[str], scores: list[Scores]) -> None:
    from ncsr_fast.files import atomic_write, json_value

    rows = [{"method": score.method, "means": score.means(), "images": score.values} for score in scores]
    with atomic_write(file) as temporary:
        temporary.write_text(
            json.dumps(json_value({"files": names, "scores": rows}), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
