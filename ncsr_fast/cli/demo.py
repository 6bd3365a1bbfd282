"""`ncsr-fast demo`: super-resolve photographs of scikit-image, and show what the flow does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import (
    Gathered,
    add_device,
    add_model,
    add_to_8bit,
    check_folder,
    count,
    path,
    pick_device,
    seed,
    temperature,
)

if TYPE_CHECKING:
    from ncsr_fast.model import NCSR

HELP = "super-resolve three photographs, or make them bright, and write a contact sheet"
EXAMPLE = """\
example:
  ncsr-fast demo --out demo_output

writes demo_output/contact_sheet.png: the LR image, bicubic, temperature 0, three samples, the standard deviation of
all samples at every pixel, and the original. The photographs come with scikit-image; nothing is downloaded.

With --model llflow-compact: the photograph made dark, temperature 0, two samples, and the original."""

# By name, the top left corner of the window that the sheet shows
_PHOTOGRAPHS = {"astronaut": (0, 100), "chelsea": (20, 110), "coffee": (60, 200)}
_SHEET = "contact_sheet.png"
_WINDOW = 240  # pixels of the HR image, a multiple of the scale
_TEMPERATURE = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo_output", type=path, help="folder for the pictures (default: %(default)s)")
    parser.add_argument(
        "--photographs",
        nargs="+",
        action=Gathered,
        choices=_PHOTOGRAPHS,
        default=list(_PHOTOGRAPHS),
        metavar="NAME",
        help=f"photographs: {', '.join(_PHOTOGRAPHS)} (default: all)",
    )
    parser.add_argument(
        "--window",
        type=count,
        default=_WINDOW,
        help="side of the shown part of a photograph, in HR pixels (default: %(default)s)",
    )
    add_model(parser)
    parser.add_argument("--n", type=count, default=10, help="samples of each photograph, at least 3 (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=temperature, default=_TEMPERATURE, help="temperature of the samples (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the samples (default: %(default)s)")
    add_to_8bit(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("the demo's photographs come with scikit-image: pip install 'ncsr_fast[demo]'") from error
    import torch
    import torch.nn.functional as F

    from ncsr_fast.data.images import crop_to_multiple, to_float, write_image
    from ncsr_fast.data.perturb import degrade
    from ncsr_fast.evaluation import timed_samples
    from ncsr_fast.figures import contact_sheet, heat_map
    from ncsr_fast.files import atomic_write
    from ncsr_fast.metrics import diversity_score, error_maps, imresize, lr_psnr, psnr, to_uint8
    from ncsr_fast.model import NCSR
    from ncsr_fast.photographs import is_low_light
    from ncsr_fast.places import check_apart, files_of_model

    if args.n < 3:
        raise ValueError(f"the sheet shows three samples, so --n must be at least 3, not {args.n}")
    device = pick_device(args.device)
    out = check_folder("--out", args.out)
    check_apart({"--out": _targets(out, args.photographs, args.n)}, {"--model": files_of_model(args.model)})
    model = NCSR.from_pretrained(args.model).to(device).eval()
    if is_low_light(model):
        return _show_dark(args, model, out)
    scale = model.config.scale
    rows, deviations = [], []
    print(
        f"{args.model} on {device}: ×{scale}, {args.n} samples of each photograph at temperature {args.temperature:g}, "
        f"8 bits: {args.to_8bit}"
    )
    print(f"{'':12}{'PSNR bicubic':>14}{'PSNR T=0':>10}{'LR-PSNR T=0':>13}{'LR-PSNR':>9}{'diversity':>11}{'s/sample':>10}")
    for name in args.photographs:
        top, left = _PHOTOGRAPHS[name]
        image = crop_to_multiple(torch.from_numpy(getattr(data, name)()).permute(2, 0, 1), 8).to(device)
        lr8 = degrade(image, scale)
        hr, lr = to_float(image), to_float(lr8)[None]
        likely, _ = timed_samples(model, lr8, 1, 0.0, args.seed)
        samples, seconds = timed_samples(model, lr8, args.n, args.temperature, args.seed)
        likely, samples = (to_float(to_uint8(images, args.to_8bit)) for images in (likely, samples))
        bicubic = to_float(imresize(lr8, scale))
        consistency = lr_psnr(samples, lr.expand(args.n, -1, -1, -1), scale).mean()
        print(
            f"{name:12}{float(psnr(bicubic[None], hr[None])):14.2f}{float(psnr(likely, hr[None])):10.2f}"
            f"{float(lr_psnr(likely, lr, scale)):13.2f}{float(consistency):9.2f}"
            f"{diversity_score(error_maps(samples, hr)):11.2f}{seconds:10.3f}"
        )
        for index, sample in enumerate(samples):
            write_image(_sample(out, name, index), sample)
        tiles = [F.interpolate(lr, scale_factor=scale, mode="nearest")[0], bicubic, likely[0], *samples[:3], hr]
        window = (..., slice(top, top + args.window), slice(left, left + args.window))
        deviations.append(samples.std(dim=0).mean(dim=0)[window])
        rows.append((name, [tile[window] for tile in tiles]))
    brightest = float(torch.cat([deviation.flatten() for deviation in deviations]).quantile(0.995))
    for (_, tiles), deviation in zip(rows, deviations):
        tiles.insert(-1, heat_map(deviation, max(brightest, 1e-3)))
    columns = [
        "LR",
        "bicubic",
        "temperature 0",
        "sample 1",
        "sample 2",
        "sample 3",
        f"std of {args.n} (0 to {255 * brightest:.0f})",
        "original",
    ]
    with atomic_write(out / _SHEET) as temporary:
        contact_sheet(rows, columns).save(temporary)
    print(f"PSNR in dB; diversity in percent, from error maps. Look at {out / _SHEET}")


def _show_dark(args: argparse.Namespace, model: NCSR, out: Path) -> None:
    import torch
    from skimage import data

    from ncsr_fast.cli._dark_demo import COLUMNS, HEADER, brightened
    from ncsr_fast.data.images import write_image
    from ncsr_fast.figures import contact_sheet
    from ncsr_fast.files import atomic_write

    device = next(model.parameters()).device
    photographs = {name: torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).to(device) for name in args.photographs}
    rows = []
    print(f"{args.model} on {device}: {args.n} samples of each photograph at temperature {args.temperature:g}\n{HEADER}")
    for shown in brightened(model, photographs, args.n, args.temperature, args.seed):
        print(shown.line)
        for index, sample in enumerate(shown.samples):
            write_image(_sample(out, shown.name, index), sample)
        top, left = _PHOTOGRAPHS[shown.name]
        window = (..., slice(top, top + args.window), slice(left, left + args.window))
        rows.append((shown.name, [tile[window] for tile in shown.tiles]))
    with atomic_write(out / _SHEET) as temporary:
        contact_sheet(rows, COLUMNS).save(temporary)
    print(f"PSNR in dB, also after the brightness was made the reference's. Look at {out / _SHEET}")


def _sample(out: Path, name: str, index: int) -> Path:
    return out / f"{name}_sample{index:05d}.png"


def _targets(out: Path, names: list[str], n: int) -> list[Path]:
    """The files that the demo writes."""
    return [out / _SHEET, *(_sample(out, name, index) for name in names for index in range(n))]
