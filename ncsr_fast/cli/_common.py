"""Arguments of the subcommands, the choice of a device, checks of paths, and messages about errors."""

from __future__ import annotations

import argparse
import errno
import glob
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ncsr_fast.systems import TEMPERATURE

DEFAULT_MODEL = "ncsr-compact-x4"
_MENDS = {
    errno.ENOSPC: "make room, or choose another disk",
    errno.EDQUOT: "make room, or choose another disk",
    errno.EFBIG: "files of this size are not allowed here (ulimit -f); raise the limit, or choose another disk",
    errno.EACCES: "change who may use it, or choose another place",
    errno.EPERM: "change who may use it, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
}
_MOST_THREADS = 8 * (os.cpu_count() or 1)  # many more threads exhaust memory, and OpenMP ends the process


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        type=path,
        help=f"model directory, published .pth, shipped name, or user/name of the Hugging Face Hub (default: {DEFAULT_MODEL})",
    )


def add_to_8bit(parser: argparse.ArgumentParser, default: str | None = "round") -> None:
    from ncsr_fast.metrics.fidelity import TO_8BIT

    parser.add_argument(
        "--to-8bit",
        choices=TO_8BIT,
        default=default,
        help="how samples become 8 bits: to the nearest level, or to the level below as the published test programs do, which "
        "costs 2 dB of LR-PSNR at 50 dB (default: round)",
    )


def _argument(description: str, read: Callable[[str], Any], accepted: Callable[[Any], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not accepted(value):
            raise argparse.ArgumentTypeError(f"should be {description}, not {text!r}")
        return value

    return convert


# values for `type` of an argument; `~` is expanded also where a shell does not expand it, as in --out=~/large
path = _argument("a path", os.path.expanduser, bool)
count = _argument("a whole number of 1 or more", int, lambda value: value >= 1)
thread_count = _argument(
    f"a whole number from 1 to {_MOST_THREADS}, 8 per processor", int, lambda value: 1 <= value <= _MOST_THREADS
)
seed = _argument("a whole number from 0 to 2⁶⁴ - 1", int, lambda value: 0 <= value < 2**64)
seconds = _argument("a number of seconds, 0 or more", float, lambda value: 0 <= value < math.inf)
temperature = _argument("a number of 0 or more", float, lambda value: 0 <= value < math.inf)
temperatures = _argument(
    "a number of 0 or more, or several with commas between them",
    lambda text: [float(number) for number in text.split(",")],
    lambda values: all(0 <= value < math.inf for value in values),
)
tile = _argument(
    "auto, none, or a whole number of 1 or more",
    lambda text: {"auto": "auto", "none": "none"}.get(text) or int(text),
    lambda value: isinstance(value, str) or value >= 1,
)


def recommended_temperature(model: Any) -> float:
    """The temperature that a model's configuration recommends for samples, or that of the NCSR paper."""
    return float(getattr(model.config, "temperature", TEMPERATURE))


def why_no_cuda() -> str:
    """The reason why this PyTorch cannot use a GPU, if `torch.cuda.is_available()` is false."""
    return "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no CUDA device"


def pick_device(name: str) -> str:
    """The device called `name`, or for "auto" the best device. Raises ValueError if there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no device {name!r} for this: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but {why_no_cuda()}; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return name


class Gathered(argparse.Action):
    """Action that collects the values of an option from all its occurrences, instead of its default."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Sequence[Any], option: object = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if given is self.default or given is None else given), *values])


class ImageFile(NamedTuple):
    """An image file to read."""

    path: Path
    folder: Path | None  # where it was found; None if the file itself was named
    deep: bool  # True if subfolders of `folder` were searched too

    @property
    def stem(self) -> str:
        """The path of the image below the folder, without the suffix."""
        inside = self.path.name if self.folder is None else self.path.relative_to(self.folder)
        return str(Path(inside).with_suffix(""))


def image_files(places: Iterable[str]) -> list[ImageFile]:
    """The images of folders, files and patterns such as "photos/*.png", each once.

    Raises:
        FileNotFoundError: A file or folder does not exist, or no file matches a pattern.
        ValueError: A folder holds no image.
    """
    from ncsr_fast.data.images import list_images

    found: dict[str, ImageFile] = {}
    for place in places:
        pattern = glob.has_magic(place) and not os.path.exists(place)
        matches = sorted(glob.glob(place, recursive=True)) if pattern else [place]
        if not matches:
            raise FileNotFoundError(f"no file matches {place!r}")
        for match in map(Path, matches):
            if not match.exists():
                raise FileNotFoundError(f"no file or folder {str(match)!r}")
            if match.is_dir():
                images = [ImageFile(image, match, deep=True) for image in list_images(match)]
            else:
                images = [ImageFile(match, match.parent if pattern else None, deep=pattern and "**" in place)]
            for image in images:
                found.setdefault(os.path.realpath(image.path), image)
    return list(found.values())


def check_folder(option: str, folder: str | os.PathLike) -> Path:
    """The path of a folder that can be written to or made; raise OSError naming the option. Nothing is made yet."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option}: {str(folder)!r} is a file; give a folder")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option}: {str(folder)!r} cannot be made, because {str(there)!r} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: {str(there)!r} cannot be written to; choose another place")
    return folder


def check_file(option: str, file: str | os.PathLike) -> Path:
    """The path of a file that can be written; raise OSError naming the option. Nothing is made yet."""
    if Path(file).is_dir():
        raise IsADirectoryError(f"{option}: {os.fspath(file)!r} is a folder; give the file to write")
    if Path(file).exists() and not Path(file).is_file():
        raise OSError(
            f"{option}: {os.fspath(file)!r} is a device or a pipe, which a file would replace; give the file to write"
        )
    check_folder(option, Path(file).absolute().parent)
    return Path(file)


def raise_problems(problems: Sequence[str], total: int, done: str) -> None:
    """Raise ValueError if there are problems: the problem of a single image, or the number of images that were not `done`.

    Several problems are printed to stderr, one per line.
    """
    if total == len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        print(f"{len(problems)} problems:", *problems, sep="\n  ", file=sys.stderr)
        raise ValueError(f"{len(problems)} of {total} images were not {done}")


def told(error: OSError) -> str:
    """A message about a system error, with the file, the cause and what to do; the message of any other error."""
    if not error.strerror:
        return str(error) or type(error).__name__
    place = f"{os.fspath(error.filename)!r}: " if error.filename is not None else ""
    mend = f"; {_MENDS[error.errno]}" if error.errno in _MENDS else ""
    return f"{place}{error.strerror}{mend}"


def too_large(file: str | os.PathLike, n: int | None = None, tile: str | int | None = None) -> str:
    """A message about an image that memory ran out for, with all of its `n` samples, or one of them in tiles of `tile`."""
    if n is not None:
        mend = "ask for fewer (--n), take a smaller --model, or crop it"
        return f"{os.fspath(file)!r} with {n} samples does not fit in memory: {mend}"
    if tile == "none":
        return f"{os.fspath(file)!r} does not fit in memory as a whole: use --tile auto"
    return f"{os.fspath(file)!r} does not fit in memory, not even in small tiles: take a smaller --model, or crop it"
