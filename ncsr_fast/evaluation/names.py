"""Files of the NTIRE challenge: the names of its years, and all that can be wrong with a folder before anything is measured."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ncsr_fast.data.images import SUFFIXES, ImageError, image_size, is_cut_png, list_images, pair_up
from ncsr_fast.data.search import named

MULTIPLE = 8  # of which the protocol crops the sides of originals, at ×4 and at ×8
_PNG = b"\x89PNG\r\n\x1a\n"
_SAMPLE = re.compile(r"(\d{6})(?:_sample(\d{5}))?\.png")
_COUNT = 100  # originals of each year


@dataclass(frozen=True)
class Protocol:
    """A year of the challenge "Learning the Super-Resolution Space"."""

    name: str
    first: int  # number of its first original
    offsets: tuple[int, ...]  # numbers that the samples of the first original may have
    curves: bool  # True if scores are measured for the first 1 … n samples, and of MSE maps as well

    @property
    def originals(self) -> range:
        """Numbers of the challenge's originals."""
        return range(self.first, self.first + _COUNT)


PROTOCOLS = {
    "ntire2021": Protocol("ntire2021", 801, (0,), curves=False),
    "ntire2022": Protocol("ntire2022", 901, (0, 901), curves=True),
}


@dataclass(frozen=True)
class Originals:
    """The originals of an evaluation, in sorted order."""

    folder: Path
    files: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]  # (height, width) before the crop
    protocol: Protocol

    @property
    def names(self) -> list[str]:
        """Their paths in the folder."""
        return [str(file.relative_to(self.folder)) for file in self.files]

    def first(self, count: int | None) -> Originals:
        """The first of them; all for None."""
        return replace(self, files=self.files[:count], sizes=self.sizes[:count])

    def paired(self, folder: str | os.PathLike) -> list[Path]:
        """The LR image of each, by name as `pair_up` has it. Raises as `list_images` and `pair_up` do."""
        return [lr for _, lr in pair_up(self.files, self.folder, list_images(folder), Path(folder))]

    def notes(self) -> list[str]:
        """Differences from the challenge's originals."""
        notes = []
        expected = [f"{number:04d}" for number in self.protocol.originals]
        if len(self.files) != _COUNT:
            fewer = "fewer" if len(self.files) < _COUNT else "more"
            notes.append(f"{len(self.files)} originals, {fewer} than the challenge's {_COUNT}: these are not its scores")
        if [file.stem for file in self.files] != expected[: len(self.files)]:
            notes.append(f"the originals are not the challenge's {expected[0]}.png to {expected[-1]}.png, or not its first")
        others = [file.name for file in self.files if not _is_png(file)]
        if others:
            notes.append(f"{len(others)} originals are not PNG files, which the challenge's are: {named(others)}")
        return notes


class BadFiles(ValueError):
    """Files that cannot be evaluated: `problems` has a line for each."""

    def __init__(self, what: str, problems: list[str]) -> None:
        counted = f"{len(problems)} problems, the first: " if len(problems) > 1 else ""
        super().__init__(f"{what}: {counted}{problems[0]}")
        self.problems = problems


def find_originals(folder: str | os.PathLike, protocol: Protocol) -> Originals:
    """The images of a folder in sorted order, as the originals of a year.

    Args:
        folder: Searched as by `list_images`.
        protocol: The year.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: As `list_images` does.
        BadFiles: Files that cannot be read, are no PNG though they are called so, are too small, or are another year's.
    """
    files = list_images(folder)
    _refuse_other_year(files, protocol)
    sizes, problems = [], []
    for file in files:
        try:
            sizes.append(_checked_size(file))
        except (ImageError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise BadFiles("originals", problems)
    originals = Originals(Path(folder), tuple(files), tuple(sizes), protocol)
    check_sides(originals, MULTIPLE)
    return originals


def check_sides(originals: Originals, smallest: int) -> None:
    """Raise BadFiles for originals with a side of less than `smallest` pixels, which cannot be measured."""
    problems = [
        f"{str(file)!r} is {height}×{width}, less than {smallest}×{smallest}, too small to be measured"
        for file, (height, width) in zip(originals.files, originals.sizes)
        if min(height, width) < smallest
    ]
    if problems:
        raise BadFiles("originals", problems)


def _refuse_other_year(files: Iterable[Path], protocol: Protocol) -> None:
    stems = [file.stem for file in files]
    for other in PROTOCOLS.values():
        theirs = {f"{number:04d}" for number in other.originals}
        if other is not protocol and stems and all(stem in theirs for stem in stems):
            raise BadFiles(
                "originals",
                [f"{named(stems)} are the originals of {other.name}, not of {protocol.name}: give --protocol {other.name}"],
            )


def find_samples(folder: str | os.PathLike, originals: Originals, n: int, scale: int) -> list[list[Path]]:
    """The files of the n samples of each original, in the order of their numbers.

    They are called `000000_sample00000.png` … as the challenge has it, `000000.png` where n is 1; those of 2022 may begin at
    000901 instead. The first number is that of the first original.

    Args:
        folder: The PNG files, none of them in a folder below.
        originals: What they are samples of.
        n: Samples of each original.
        scale: Of the super-resolution: a sample may have up to so many pixels a side more than its original, less one.

    Returns:
        n paths for each original.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such folder.
        BadFiles: All that is wrong: names of another year or of no year, missing samples, samples of more originals or more
            of an original than there should be, files that are no PNG or broken off, sizes that do not fit the original.
    """
    found = _numbered(Path(folder), originals.protocol, n)
    first = _first_number({number for number, _ in found}, originals.protocol)
    expected = {(first + place, index) for place in range(len(originals.files)) for index in range(n)}
    problems = _missing(Path(folder), sorted(expected - found.keys()), n)
    problems += _superfluous(sorted(found.keys() - expected), first, len(originals.files), n)
    if problems:
        raise BadFiles(f"samples in {str(folder)!r}", problems)
    samples = [[found[first + place, index] for index in range(n)] for place in range(len(originals.files))]
    problems = [
        problem
        for files, name, size in zip(samples, originals.names, originals.sizes)
        for problem in _unsuitable(files, name, size, scale)
    ]
    if problems:
        raise BadFiles(f"samples in {str(folder)!r}", problems)
    return samples


def sample_name(number: int, index: int, n: int) -> str:
    """The challenge's name for a sample."""
    return f"{number:06d}.png" if n == 1 else f"{number:06d}_sample{index:05d}.png"


def _numbered(folder: Path, protocol: Protocol, n: int) -> dict[tuple[int, int], Path]:
    """The images of a folder by the number of their original and their own; BadFiles for names that are not the challenge's."""
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{str(folder)!r} is a file; give the folder that samples are in")
        raise FileNotFoundError(f"no folder {str(folder)!r} of samples")
    found, strange = {}, []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in SUFFIXES:
            continue
        match = _SAMPLE.fullmatch(file.name)
        if match and (match[2] is None) == (n == 1):
            found[int(match[1]), int(match[2] or 0)] = file
        else:
            strange.append(file.name)
    if strange or not found:
        held = f"{len(strange)} files are called otherwise, {named(strange)}" if strange else "there are none"
        raise BadFiles(
            f"samples in {str(folder)!r}",
            [f"{held}; {protocol.name} with --n {n} has {' or '.join(_first_names(protocol, n))}, and so on"],
        )
    return found


def _first_names(protocol: Protocol, n: int) -> list[str]:
    return [sample_name(offset, 0, n) for offset in protocol.offsets]


def _first_number(numbers: set[int], protocol: Protocol) -> int:
    """The number of the first original's samples; BadFiles for numbers that begin as another year's do."""
    lowest = min(numbers)
    if lowest in protocol.offsets:
        return lowest
    for other in PROTOCOLS.values():
        if lowest in other.offsets:
            raise BadFiles("samples", [f"they begin at {lowest:06d}, as those of {other.name}: give --protocol {other.name}"])
    return protocol.offsets[0]


def _missing(folder: Path, missing: list[tuple[int, int]], n: int) -> list[str]:
    by_original: dict[int, list[int]] = {}
    for number, index in missing:
        by_original.setdefault(number, []).append(index)
    return [
        f"{len(indices)} of {n} samples of original {number:06d} are missing: "
        f"{named(str(folder / sample_name(number, index, n)) for index in indices)}"
        for number, indices in by_original.items()
    ]


def _superfluous(others: list[tuple[int, int]], first: int, count: int, n: int) -> list[str]:
    problems = []
    beyond = sorted({number for number, _ in others if not first <= number < first + count})
    if beyond:
        numbers = named(f"{number:06d}" for number in beyond)
        problems.append(f"there are {count} originals, and samples of {len(beyond)} more: {numbers}")
    more = sorted({number for number, _ in others if first <= number < first + count})
    if more:
        numbers = named(f"{number:06d}" for number in more)
        problems.append(f"there are more than {n} samples of {len(more)} originals, {numbers}: give their number as --n")
    return problems


def _unsuitable(files: Iterable[Path], name: str, size: tuple[int, int], scale: int) -> list[str]:
    """Problems of the samples of one original of this size."""
    least = tuple(side - side % MULTIPLE for side in size)
    problems = []
    for file in files:
        try:
            if not _is_png(file):
                raise ImageError(f"{str(file)!r} is not a PNG file")
            found = _checked_size(file)
            if any(side < low or side >= high + scale for side, low, high in zip(found, least, size)):
                raise ImageError(
                    f"{str(file)!r} is {found[0]}×{found[1]} and its original {name} {size[0]}×{size[1]}: "
                    f"they should be of one size, or the sample {least[0]}×{least[1]}"
                )
        except (ImageError, OSError) as error:
            problems.append(str(error))
    return problems


def _checked_size(file: Path) -> tuple[int, int]:
    """(height, width) of an image whose header can be read, and that is not broken off as far as a PNG tells."""
    size = image_size(file)
    if file.suffix.lower() == ".png" and not _is_png(file):
        raise ImageError(f"{str(file)!r} is not a PNG file, though it is called so")
    if is_cut_png(file):
        raise ImageError(f"cannot read image {str(file)!r}: it is broken off; copy it again")
    return size


def _is_png(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(_PNG)) == _PNG
