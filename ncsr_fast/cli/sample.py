"""`ncsr-fast sample`: super-resolve image files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ncsr_fast.cli._common import add_device, add_model, pick_device

HELP = "super-resolve an image, or every image of a folder"
EXAMPLE = """\
example:
  ncsr-fast sample small.png --out large/ --n 5 --temperature 0.8 --seed 1 --names source

writes large/small_sample00000.png … large/small_sample00004.png. With --names ntire (the default) files are called
000000_sample00000.png … as the NTIRE 2021 toolkit expects, numbered in the order of the sorted input names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="LR image, or a folder of them, searched recursively")
    parser.add_argument("--out", required=True, help="folder the PNG files are written to")
    add_model(parser)
    parser.add_argument("--n", type=int, default=10, help="samples of each image (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.9, help="standard deviation of the latents (default: %(default)s)"
    )
    parser.add_argument(
        "--on-nonfinite",
        choices=("warn", "retry", "raise", "ignore"),
        default="warn",
        help="what to do about a sample that blew up; retry draws it again at a lower temperature (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the latents of each image (default: %(default)s)")
    parser.add_argument(
        "--names", choices=("ntire", "source"), default="ntire", help="how to name the files (default: %(default)s)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ncsr_fast.data.images import ImageError, list_images, read_image, to_float, write_image
    from ncsr_fast.nn.ncsr import NCSR

    device = pick_device(args.device)
    source = Path(args.input)
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {args.input!r}")
    paths = list_images(source) if source.is_dir() else [source]
    root = source if source.is_dir() else source.parent
    model = NCSR.from_pretrained(args.model).to(device).eval()
    dtype = next(model.parameters()).dtype
    failures: list[str] = []
    for number, path in enumerate(tqdm(paths, unit="image", disable=len(paths) == 1)):
        try:
            lr = to_float(read_image(path))[None].to(device, dtype)
        except ImageError as error:
            failures.append(str(error))
            continue
        with torch.inference_mode():
            generator = torch.Generator(device).manual_seed(args.seed)
            samples = model.sample(lr, args.n, args.temperature, generator, on_nonfinite=args.on_nonfinite)[0]
        bad = int((~torch.isfinite(samples)).flatten(1).any(dim=1).sum())
        if bad:
            failures.append(f"{bad} of {args.n} samples of {str(path)!r} are not finite: lower the temperature")
        stem = f"{number:06d}" if args.names == "ntire" else str(path.relative_to(root).with_suffix(""))
        for index, sample in enumerate(samples):
            write_image(Path(args.out) / f"{stem}_sample{index:05d}.png", sample.nan_to_num(0))
    print(f"{len(paths)} images × {args.n} samples → {args.out}")
    if failures:
        print(f"{len(failures)} problems:", *failures, sep="\n  ", file=sys.stderr)
        raise ValueError(f"{len(failures)} of {len(paths)} images were not sampled as asked")
