"""`ncsr-fast evaluate --protocol`: the challenge's measurements of a folder of samples, or of a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import DEFAULT_MODEL, check_file, pick_device, raise_problems
from ncsr_fast.cli.evaluate import lpips_or_none

if TYPE_CHECKING:
    from ncsr_fast.evaluation.methods import Method
    from ncsr_fast.evaluation.names import Originals

_SCALE = 4  # of files, which do not say it
_OF_MODELS = ("model", "lr_images", "nll", "long_skip", "generator_noise")


def run_protocol(args: argparse.Namespace, temperatures: list[float] | None) -> None:
    """Check everything, measure, print, write, and raise for what was not measured."""
    from tqdm import tqdm

    from ncsr_fast.evaluation.names import MULTIPLE, BadFiles, check_sides
    from ncsr_fast.evaluation.protocol import SMALLEST_FOR_LPIPS, evaluate_method
    from ncsr_fast.memory import within_free_memory
    from ncsr_fast.places import check_apart, files_of_model

    device = pick_device(args.device)
    outputs = {f"--{option}": [file] for option in ("json", "csv") if (file := getattr(args, option))}
    for option, (file,) in outputs.items():
        check_file(option, file)
    folders = {"the images": [args.images], "--samples": [args.samples], "--lr-images": [args.lr_images]}
    model = [] if args.samples is not None else files_of_model(args.model or DEFAULT_MODEL)
    check_apart(outputs, {**{name: places for name, places in folders.items() if places[0]}, "--model": model})
    try:
        method, originals, scale, lr_images = _inputs(args, temperatures, device)
        network = lpips_or_none(device)
        check_sides(originals, MULTIPLE if network is None else SMALLEST_FOR_LPIPS)
    except BadFiles as error:
        if len(error.problems) > 1:
            print(f"{len(error.problems)} problems:", *error.problems, sep="\n  ", file=sys.stderr)
        raise
    with within_free_memory() if device == "cpu" else contextlib.nullcontext():
        with tqdm(total=len(originals.files), unit="image") as bar:

            def progress(line: str) -> None:
                tqdm.write(line)
                bar.update()

            report, problems = evaluate_method(
                method,
                originals,
                scale,
                network=network,
                device=device,
                lr_images=lr_images,
                progress=progress,
            )
    print(report.table())
    if args.json:
        report.write_json(args.json)
    if args.csv:
        report.write_csv(args.csv)
    raise_problems(problems, len(originals.files), "measured")


def _inputs(
    args: argparse.Namespace, temperatures: list[float] | None, device: str
) -> tuple[Method, Originals, int, list[Path] | None]:
    """The method, the originals, the scale, and the LR images of the originals where they are given."""
    from ncsr_fast.evaluation.methods import Folder, load_method
    from ncsr_fast.evaluation.names import PROTOCOLS, find_originals, find_samples
    from ncsr_fast.systems import TEMPERATURE

    originals = find_originals(args.images, PROTOCOLS[args.protocol or "ntire2021"])
    if args.samples is not None:
        given = [option for option in _OF_MODELS if getattr(args, option)] + ["temperatures"] * (temperatures is not None)
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to a model, and --samples are files: give one of the two")
        scale = args.scale or _SCALE
        files = find_samples(args.samples, originals, args.n, scale)
        return Folder(args.samples, files[: args.limit], args.to_8bit), originals.first(args.limit), scale, None
    if temperatures is not None and len(temperatures) > 1:
        raise ValueError("--protocol measures one temperature at a time: give one")
    method, scale = load_method(
        args.model or DEFAULT_MODEL,
        args.scale or (_SCALE if args.model == "bicubic" else None),
        n=args.n,
        temperature=TEMPERATURE if temperatures is None else temperatures[0],
        seed=args.seed,
        to_8bit=args.to_8bit or "round",
        likelihood=args.nll,
        long_skip=args.long_skip,
        noise=args.generator_noise,
        device=device,
    )
    lr_images = None if args.lr_images is None else originals.paired(args.lr_images)
    return method, originals.first(args.limit), scale, None if lr_images is None else lr_images[: args.limit]
