"""`ncsr-fast sample`: super-resolve image files."""

from __future__ import annotations

import argparse
import errno
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import (
    ImageFile,
    add_device,
    add_model,
    check_folder,
    count,
    image_files,
    path,
    pick_device,
    raise_problems,
    seed,
    temperature,
    told,
    too_large,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ncsr_fast.model import NCSR

# errors of writing that concern one image's samples alone, with messages that say more than the system's
_IN_THE_WAY = "a folder is where a sample, or a file where a folder of samples should be; move it, or choose another --out"
_OF_ONE = {
    errno.ENAMETOOLONG: "the names of its samples are too long; use --names ntire",
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), _IN_THE_WAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM)),
}
HELP = "super-resolve images, or every image of a folder"
EXAMPLE = """\
example:
  ncsr-fast sample small.png --out large/ --n 5 --temperature 0.8 --seed 1 --names source

The example writes large/small_sample00000.png … large/small_sample00004.png. With --names ntire (the default) files are called
000000_sample00000.png … as the NTIRE 2021 toolkit expects, numbered in the order of the input. Existing files of the same
names are replaced. Other samples in the folder are not deleted; a message names them.

A message names files in a folder that are not images. If an image cannot be read or does not fit in memory, a message names
it, the other images are sampled, and the exit status is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", nargs="+", type=path, help="LR images, folders (searched recursively), or patterns such as 'photos/*.png'"
    )
    parser.add_argument("--out", required=True, type=path, help="folder to write the PNG files to")
    add_model(parser)
    parser.add_argument("--n", type=count, default=10, help="samples of each image (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=temperature, default=0.9, help="standard deviation of the latents (default: %(default)s)"
    )
    parser.add_argument(
        "--on-nonfinite",
        choices=("warn", "retry", "raise", "ignore"),
        default="warn",
        help="what to do about a blown-up sample; retry draws it again at a lower temperature, raise leaves out its image "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the latents of each image (default: %(default)s)")
    parser.add_argument(
        "--names", choices=("ntire", "source"), default="ntire", help="how to name the files (default: %(default)s)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    import contextlib

    from tqdm import tqdm

    from ncsr_fast.data.images import ImageError, write_image
    from ncsr_fast.flow.samples import NonFiniteSamples
    from ncsr_fast.memory import is_out_of_memory, within_free_memory
    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    device = pick_device(args.device)
    files = image_files(args.input)
    out = check_folder("--out", args.out)
    stems = _stems(files, args.names)
    _check_searched(files, stems, out)
    targets = [target for stem in stems for target in _targets(out, stem, args.n)]
    check_apart({"--out": targets}, {"the input": [file.path for file in files], "--model": files_of_model(args.model)})
    earlier = set(out.rglob("*_sample[0-9]*.png"))
    model = NCSR.from_pretrained(args.model).to(device).eval()
    problems: list[str] = []
    written: list[Path] = []
    with within_free_memory() if device == "cpu" else contextlib.nullcontext():
        for file, stem in zip(tqdm(files, unit="image", disable=len(files) == 1), stems):
            try:
                samples, problem = _sampled(model, file.path, args)
                for target, sample in zip(_targets(out, stem, args.n), samples):
                    write_image(target, sample)
                    written.append(target)
            except (ImageError, FileNotFoundError, NonFiniteSamples) as error:
                problem = f"{str(file.path)!r}: {error}" if isinstance(error, NonFiniteSamples) else str(error)
            except OSError as error:
                if error.errno not in _OF_ONE:
                    raise
                problem = f"{str(file.path)!r}: {_OF_ONE[error.errno] or told(error)}"
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = too_large(file.path, args.n)
            problems += [problem] if problem else []
    share = "" if len(written) == args.n * len(files) else f" of {len(files)}"
    print(f"{len(written) // args.n}{share} images × {args.n} samples → {args.out}")
    _name_earlier(sorted(earlier - set(written)))
    raise_problems(problems, len(files), "sampled as asked")


def _sampled(model: NCSR, file: Path, args: argparse.Namespace) -> tuple[Tensor, str | None]:
    """The samples (n, 3, sH, sW) of an image, with 0 for what is not finite, and what is wrong with them."""
    import torch

    from ncsr_fast.data.images import read_image, to_float

    like = next(model.parameters())
    lr = to_float(read_image(file))[None].to(like)
    with torch.inference_mode():
        generator = torch.Generator(like.device).manual_seed(args.seed)
        samples = model.sample(lr, args.n, args.temperature, generator, on_nonfinite=args.on_nonfinite)[0]
    bad = int((~torch.isfinite(samples)).flatten(1).any(dim=1).sum())
    if not bad:
        return samples, None
    problem = f"{bad} of {args.n} samples of {str(file)!r} have pixels that are not finite, which are black. {model.advice(lr)}"
    return samples.nan_to_num(0), problem


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
