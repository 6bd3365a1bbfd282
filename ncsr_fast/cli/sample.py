"""`ncsr-fast sample`: super-resolve image files."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ncsr_fast.cli._common import (
    ImageFile,
    add_device,
    add_model,
    add_to_8bit,
    check_folder,
    count,
    image_files,
    path,
    pick_device,
    raise_problems,
    recommended_temperature,
    seed,
    temperatures,
    tile,
)
from ncsr_fast.cli._sampling import Job, Sampler, Share, Stream

HELP = "super-resolve images, or make dark ones bright, every image of a folder too"
EXAMPLE = """\
example:
  ncsr-fast sample small.png --out large/ --n 5 --temperature 0.8 --seed 1
  ncsr-fast sample photos/ --out large/ --skip-existing
  ncsr-fast sample dark.png --out bright/ --model llflow-compact
  torchrun --nproc-per-node 4 -m ncsr_fast.cli.main sample photos/ --out large/

The first writes large/small_sample00000.png … large/small_sample00004.png. With --names ntire files are called
000000_sample00000.png … as the NTIRE 2021 toolkit expects, numbered in the order of the input. Files of the same names
that are there already are replaced, other samples stay, and are named. With --skip-existing images all of whose samples
are there are passed over, so that an interrupted run goes on.

An image of any size is sampled in the memory that there is: a large one in tiles, which change nothing but rounding. The
same seed gives an image the same samples whatever else is sampled, in whatever tiles, by however many threads or processes.

A low-light model makes one image at temperature 0 unless --n or --temperature is given. Its input, six channels of the
photograph mirrored beyond its edges, is made here.

What a folder holds beside images is named, as are images that cannot be read or do not fit in memory. The others are
sampled nevertheless, and the exit status is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        nargs="+",
        type=path,
        help="LR or dark images, folders of them, searched recursively, or patterns as 'photos/*.png'",
    )
    parser.add_argument("--out", required=True, type=path, help="folder to write the PNG files to")
    add_model(parser)
    parser.add_argument("--n", type=count, help="samples of each image (default: 10; 1 at temperature 0)")
    parser.add_argument(
        "--temperature",
        type=temperatures,
        help="standard deviation of the latents, or 0.9,0.7 … that of each latent, the coarsest last (default: what the model "
        "recommends)",
    )
    parser.add_argument(
        "--tile",
        type=tile,
        default="auto",
        metavar="N",
        help="LR pixels a side of the tiles that large images are decoded in; auto: as the free memory allows; none: whole "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--on-nonfinite",
        choices=("warn", "retry", "raise", "ignore"),
        default="warn",
        help="what to do about a blown-up sample; retry draws it again at a lower temperature, raise leaves out its image "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--project",
        action="store_true",
        help="put samples onto the LR image: change them as little as makes their bicubic reduction that image",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the latents of each image (default: %(default)s)")
    parser.add_argument(
        "--names", choices=("source", "ntire"), default="source", help="how to name the files (default: %(default)s)"
    )
    add_to_8bit(parser)
    parser.add_argument("--skip-existing", action="store_true", help="pass over images all of whose samples are there")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.memory import within_free_memory
    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    share = Share.of_environment()
    device = pick_device(share.device(args.device))
    files = image_files(args.input)
    out = check_folder("--out", args.out)
    stems = _stems(files, args.names)
    _check_searched(files, stems, out)
    model = NCSR.from_pretrained(args.model).to(device).eval()
    args.temperature = args.temperature or [recommended_temperature(model)]
    if args.n is None:
        args.n = 10 if any(args.temperature) else 1
    jobs = [Job(file.path, _targets(out, stem, args.n)) for file, stem in zip(files, stems)]
    targets = {target for job in jobs for target in job.targets}
    check_apart({"--out": targets}, {"the input": [file.path for file in files], "--model": files_of_model(args.model)})
    earlier = set(out.rglob("*_sample[0-9]*.png")) - targets
    own = jobs[share.rank :: share.processes]
    left = [job for job in own if not (args.skip_existing and job.is_done)]
    with within_free_memory() if device == "cpu" else contextlib.nullcontext():
        stream = Stream(Sampler(model, args), quiet=share.rank > 0)
        problems = stream.run(left)
    share.tell(f"{_account(left, len(own), args.n)} → {args.out} (8 bits: {args.to_8bit})")
    if args.project and any(job.written for job in left):
        least = stream.least_psnr
        how = f"LR-PSNR at least {least:.1f} dB" if least < math.inf else "their bicubic reductions are the LR images"
        share.tell(f"projected onto the LR images: {how}")
    if share.rank == 0:
        _name_earlier(sorted(earlier))
    raise_problems(problems, len(left), "sampled as asked")


def _account(jobs: Sequence[Job], total: int, n: int) -> str:
    """What was written, in words."""
    done = sum(job.written == n for job in jobs)
    there = total - len(jobs)
    return f"{done}{'' if done == total else f' of {total}'} images × {n} samples" + (f", {there} were there" if there else "")


def _stems(files: Sequence[ImageFile], names: str) -> list[str]:
    """The names of each image's samples, up to _sample; raise ValueError if two images have the same name."""
    if names == "ntire":
        return [f"{number:06d}" for number in range(len(files))]
    found: dict[str, Path] = {}
    for file in files:
        key = unicodedata.normalize("NFC", file.stem).casefold()  # as some file systems compare names
        if key in found:
            raise ValueError(
                f"samples of {str(found[key])!r} and {str(file.path)!r} would have the same names; rename one, "
                "or number them with --names ntire"
            )
        found[key] = file.path
    return [file.stem for file in files]


def _targets(out: Path, stem: str, n: int) -> list[Path]:
    return [out / f"{stem}_sample{index:05d}.png" for index in range(n)]


def _check_searched(files: Sequence[ImageFile], stems: Sequence[str], out: Path) -> None:
    """Raise ValueError if a sample would be an input image of the next run."""
    searched = {(place.resolve(), file.deep) for file in files if file.folder for place in (file.folder, file.path.parent)}
    for place in {(out / stem).parent.resolve() for stem in stems}:
        for folder, deep in searched:
            if folder == place or (deep and folder in place.parents):
                raise ValueError(
                    f"samples in {str(place)!r} would be input of the next run, {str(folder)!r}; choose another --out"
                )


def _name_earlier(samples: Sequence[Path]) -> None:
    from ncsr_fast.data.search import named

    if samples:
        print(f"{len(samples)} samples of an earlier run are still in the folder: {named(map(str, samples))}", file=sys.stderr)
