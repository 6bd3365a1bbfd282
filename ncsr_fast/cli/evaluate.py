"""`ncsr-fast evaluate`: measure a model on photographs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ncsr_fast.cli._common import add_device, add_model, pick_device

HELP = "measure a model on a folder of HR images, beside bicubic"
EXAMPLE = """\
example:
  ncsr-fast evaluate photos/ --temperatures 0 0.5 0.8 --n 10 --json scores.json

PSNR, SSIM, LR-PSNR (mean, and the worst of each image's samples) and diversity, means over images; LPIPS and the
NTIRE diversity score as well where the lpips package and its weights are installed. HR images are cropped to
multiples of 8 and LR images made by MATLAB bicubic unless --lr-images names them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="folder of HR images, searched recursively")
    parser.add_argument("--lr-images", help="folder of their LR images (default: MATLAB bicubic)")
    add_model(parser)
    parser.add_argument("--n", type=int, default=10, help="samples of each image above temperature 0 (default: %(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 0.8], help="(default: 0 0.5 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents of each image (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first so many images")
    parser.add_argument("--json", help="also write the means and every image's values to this file")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ncsr_fast.data.images import crop_to_multiple, list_images, pair_up, read_image
    from ncsr_fast.evaluation import evaluate, table
    from ncsr_fast.files import atomic_write
    from ncsr_fast.metrics.perceptual import LPIPSUnavailable, lpips_model
    from ncsr_fast.nn.ncsr import NCSR

    device = pick_device(args.device)
    paths = list_images(args.images)[: args.limit]
    lr_images = None
    if args.lr_images is not None:
        pairs = pair_up(paths, Path(args.images), list_images(args.lr_images), Path(args.lr_images))
        lr_images = (read_image(lr) for _, lr in pairs)
    model = NCSR.from_pretrained(args.model).to(device).eval()
    try:
        network = lpips_model(device=device)
    except LPIPSUnavailable as error:
        network = None
        print(f"without LPIPS: {error}", file=sys.stderr)
    images = (
        crop_to_multiple(read_image(path), 8) if lr_images is None else read_image(path) for path in tqdm(paths, unit="image")
    )
    scores = evaluate(model, images, args.temperatures, args.n, args.seed, network, lr_images, progress=tqdm.write)
    print(f"{args.model}, {len(paths)} images, {args.n} samples each, {device}")
    print(table(scores))
    if args.json:
        rows = [{"method": score.method, "means": score.means(), "images": score.values} for score in scores]
        with atomic_write(args.json) as path:
            path.write_text(json.dumps({"files": [str(path.name) for path in paths], "scores": rows}, indent=1) + "\n")
