"""`ncsr-fast evaluate`: measure a model, or the samples of any method, on photographs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncsr_fast.cli._common import (
    DEFAULT_MODEL,
    Gathered,
    add_device,
    add_model,
    add_to_8bit,
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
    from ncsr_fast.evaluation.low_light import LowLightEvaluation
    from ncsr_fast.evaluation.temperatures import Evaluation, Scores
    from ncsr_fast.model import NCSR

_MULTIPLE = 8  # the sides of HR images are multiples of this number, whatever the scale
_N = 10  # the challenge's
_TEMPERATURES = [0.0, 0.5, 0.8]
HELP = "measure a model or a folder of samples on HR images"
EXAMPLE = """\
example:
  ncsr-fast evaluate photos/ --temperatures 0 0.5 0.8 --n 10 --json scores.json
  ncsr-fast evaluate DIV2K_valid_HR/ --samples theirs/ --scale 4 --n 10 --protocol ntire2021 --json theirs.json --csv theirs.csv
  ncsr-fast evaluate DIV2K_valid_HR/ --protocol ntire2021 --model runs/mine/model --to-8bit truncate --json mine.json
  ncsr-fast evaluate LOL/eval15/high/ --lr-images LOL/eval15/low/ --model llflow-compact --json scores.json
  ncsr-fast evaluate --table 1 --config tables.yml --out tables/

Without --protocol and --samples: a model at each temperature beside bicubic. PSNR, SSIM, LR-PSNR (mean, and the worst of each
image's samples) and diversity, means over images; LPIPS and the NTIRE diversity score as well where the lpips package is
installed (its weights, of 233 MB, are downloaded once). HR images are cropped to multiples of 8 and LR images made by MATLAB
bicubic unless --lr-images names them; then to the size that theirs says. A low-light model is measured on pairs of bright
photographs and the dark ones that --lr-images names, at temperature 0 by default: PSNR, SSIM and LPIPS of the dark photograph,
of the samples, and of the samples made as bright as the reference.

With --protocol: exactly what the NTIRE challenge of that year measures, of a folder of PNG files (--samples) of any method, or
of a model: a flow, a generator (RRDB, ESRGAN …), or the word bicubic. Originals are taken in sorted order; samples are called
000000_sample00000.png … as `ncsr-fast sample --names ntire` writes them. All files are checked before the first is measured.
docs/evaluation.md has the protocol.

Images that cannot be read, do not fit their LR image or do not fit in memory are named, the means are those of the others,
and the exit status is 1. In the JSON a value that is infinite (the PSNR of equal images) or not a number is null."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=path, nargs="?", help="folder of HR images, searched recursively")
    parser.add_argument("--lr-images", type=path, help="folder of the LR images (default: made by MATLAB bicubic)")
    add_model(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--n", type=count, help=f"samples of each image above temperature 0 (default: {_N})")
    parser.add_argument(
        "--temperatures",
        type=temperature,
        nargs="+",
        action=Gathered,
        default=_TEMPERATURES,
        help="of the samples (default: 0 0.5 0.8; with --protocol one, 0.9)",
    )
    parser.add_argument("--seed", type=seed, help="of the latents of each image (default: 0)")
    parser.add_argument("--limit", type=count, help="use only this number of images, from the first on")
    parser.add_argument("--json", type=path, help="also write the means and every image's values to this file")
    parser.add_argument("--csv", type=path, help="also write a line for each image to this file")
    add_to_8bit(parser, default=None)
    challenge = parser.add_argument_group("the NTIRE challenge's protocol, for any method")
    challenge.add_argument("--protocol", choices=("ntire2021", "ntire2022"), help="the year (with --samples: ntire2021)")
    challenge.add_argument("--samples", type=path, help="folder of PNG files of a method's samples")
    challenge.add_argument("--scale", type=count, help="of the super-resolution (default: the model's; of files 4)")
    challenge.add_argument("--nll", action="store_true", help="also measure a flow's likelihood of the originals")
    challenge.add_argument(
        "--long-skip",
        choices=("conv_first", "last_block"),
        help="of a generator in a file: last_block for SRFlow's and NCSR's RRDB",
    )
    challenge.add_argument(
        "--generator-noise", choices=("none", "dense", "all"), help="noise of a generator that is drawn (ESRGAN+: dense)"
    )
    tables = parser.add_argument_group("the tables of the NCSR paper")
    tables.add_argument("--table", type=int, choices=(1, 2, 5, 6), help="measured beside printed, of what --config names")
    tables.add_argument("--config", type=path, help="YAML of methods, reports and folders")
    tables.add_argument("--out", type=path, help="folder that the table and its plots are written to")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    if args.table is not None:
        from ncsr_fast.cli._tables import run_table

        return run_table(args, {name for name in vars(args) if getattr(args, name) not in (None, False, _TEMPERATURES)})
    args.n, args.seed = args.n or _N, args.seed or 0
    for option in ("config", "out"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} belongs to --table")
    if args.images is None:
        raise ValueError("give the folder of HR images")
    if args.samples is not None or args.protocol is not None:
        from ncsr_fast.cli._protocol import run_protocol

        return run_protocol(args, None if args.temperatures is _TEMPERATURES else args.temperatures)
    for option in ("scale", "nll", "long_skip", "generator_noise"):
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} belongs to --protocol")
    return _run_temperatures(args)


def _run_temperatures(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ncsr_fast.evaluation.temperatures import table
    from ncsr_fast.memory import within_free_memory
    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    device = pick_device(args.device)
    name, to_8bit = args.model or DEFAULT_MODEL, args.to_8bit or "round"
    outputs = {f"--{option}": [file] for option in ("json", "csv") if (file := getattr(args, option))}
    for option, (file,) in outputs.items():
        check_file(option, file)
    read = {"the images": [args.images], "--lr-images": [args.lr_images] if args.lr_images else []}
    check_apart(outputs, {**read, "--model": files_of_model(name)})
    pairs = _pairs(args)
    model = NCSR.from_pretrained(name).to(device).eval()
    evaluation = _evaluation(model, args, to_8bit, device)
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
        print(f"{name}, {len(measured)} images, {args.n} samples each, 8 bits: {to_8bit}, {device}")
        print(table(evaluation.scores))
        names = [str(hr.relative_to(args.images)) for hr in measured]
        if args.json:
            _write_json(args.json, names, evaluation.scores, {"to_8bit": to_8bit, "n": args.n, "seed": args.seed})
        if args.csv:
            _write_csv(args.csv, names, evaluation.scores)
    raise_problems(problems, len(pairs), "measured")


def _evaluation(model: NCSR, args: argparse.Namespace, to_8bit: str, device: str) -> Evaluation | LowLightEvaluation:
    from ncsr_fast.evaluation.low_light import LowLightEvaluation
    from ncsr_fast.evaluation.temperatures import Evaluation
    from ncsr_fast.photographs import is_low_light

    dark = is_low_light(model)
    if dark and args.lr_images is None:
        raise ValueError(f"{model.describe()}, makes dark photographs bright: give the dark ones of the images, --lr-images")
    how = args.n, args.seed, lpips_or_none(device), to_8bit
    if not dark:
        return Evaluation(model, args.temperatures, *how)
    return LowLightEvaluation(model, [0.0] if args.temperatures is _TEMPERATURES else args.temperatures, *how)


def lpips_or_none(device: str, notes: list[str] | None = None) -> Any:
    """The LPIPS network; None where it cannot be had, after a line on stderr, and in `notes`, that says why."""
    from ncsr_fast.metrics.perceptual import LPIPSUnavailable, lpips_model

    try:
        return lpips_model(device=device)
    except LPIPSUnavailable as error:
        told = f"without LPIPS: {error}"
        print(told, file=sys.stderr)
        if notes is not None:
            notes.append(told)
        return None


def _pairs(args: argparse.Namespace) -> list[tuple[Path, Path | None]]:
    """The first HR images, each with its LR image if LR images are given."""
    from ncsr_fast.data.images import list_images, pair_up

    images = list_images(args.images)
    if args.lr_images is None:
        return [(image, None) for image in images][: args.limit]
    return pair_up(images, Path(args.images), list_images(args.lr_images), Path(args.lr_images))[: args.limit]


def _add(evaluation: Evaluation | LowLightEvaluation, hr: Path, lr: Path | None, n: int) -> str | None:
    """Measure an image; return the reason if it cannot be measured, else None."""
    from tqdm import tqdm

    from ncsr_fast.data.images import ImageError, crop_to_multiple, read_image
    from ncsr_fast.memory import is_out_of_memory
    from ncsr_fast.warn import warnings_about

    try:
        image, given = read_image(hr), None if lr is None else read_image(lr)
        if lr is None and min(image.shape[-2:]) >= _MULTIPLE:
            image = crop_to_multiple(image, _MULTIPLE)
        try:
            with warnings_about(hr):
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


def _write_json(file: str, names: list[str], scores: list[Scores], how: dict[str, Any]) -> None:
    from ncsr_fast.evaluation.bootstrap import mean_interval
    from ncsr_fast.files import atomic_write, json_value

    rows = []
    for score in scores:
        intervals = {key: mean_interval(values) for key, values in score.values.items()}
        intervals = {key: None if interval is None else list(interval) for key, interval in intervals.items()}
        rows.append({"method": score.method, "means": score.means(), "intervals": intervals, "images": score.values})
    with atomic_write(file) as temporary:
        text = json.dumps(json_value({**how, "files": names, "scores": rows}), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _write_csv(file: str, names: list[str], scores: list[Scores]) -> None:
    from ncsr_fast.evaluation.reports import write_csv

    keys = list(dict.fromkeys(key for score in scores for key in score.values))
    rows = [
        {"name": name, "method": score.method, **{key: score.values[key][place] if key in score.values else "" for key in keys}}
        for place, name in enumerate(names)
        for score in scores
    ]
    write_csv(file, rows)
