"""The samples of image files, in the memory that there is: read ahead, drawn in groups and tiles, written behind.

While an image is decoded the next one is read, and the samples before it are compressed and written.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.cli._common import told, too_large
from ncsr_fast.memory import free_bytes, is_out_of_memory
from ncsr_fast.warn import warnings_about

if TYPE_CHECKING:
    from ncsr_fast.flow.estimate import SamplesMemory
    from ncsr_fast.flow.samples import ConditionedFlow
    from ncsr_fast.model import NCSR

_GIB = 2**30
_TOLD = _GIB  # an image that takes more memory is one that its user is told of
_USABLE = 2  # samples are decoded together as far as one in so many parts of the free memory holds them
# errors of writing that are of one image's samples, and what is said of them where the system's words are not enough
_IN_THE_WAY = "a folder is where a sample, or a file where a folder of samples should be; move it, or choose another --out"
_OF_ONE = {
    errno.ENAMETOOLONG: "the names of its samples are too long; use --names ntire",
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), _IN_THE_WAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM)),
}


@dataclass
class Job:
    """An image file and the files of its samples; `written` counts those that are done."""

    file: Path
    targets: list[Path]
    written: int = 0

    @property
    def is_done(self) -> bool:
        """True where all files are there; each of them is whole, since it was renamed to its name."""
        return all(target.is_file() for target in self.targets)


class Share(NamedTuple):
    """The part of the images that this process samples, of those that torchrun started."""

    rank: int = 0
    processes: int = 1
    on_machine: int = 0

    @classmethod
    def of_environment(cls) -> Share:
        """As torchrun's variables say; all of them where there are none."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))

    def device(self, name: str) -> str:
        """The device of this process, where `name` leaves it open."""
        several = self.processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.on_machine}" if several else name

    def tell(self, line: str) -> None:
        """Print a line, with the process where there are several."""
        print(line if self.processes == 1 else f"process {self.rank + 1} of {self.processes}: {line}")


class Stream:
    """Images one after the other, and what is wrong with those that could not be sampled.

    Args:
        sampler: Draws the samples.
        quiet: No bar.
    """

    def __init__(self, sampler: Sampler, quiet: bool) -> None:
        self.sampler, self.quiet = sampler, quiet
        self.problems: list[str] = []
        self.least_psnr = math.inf  # LR-PSNR in dB, of projected samples
        self._behind: list[tuple[Job, Future[None]]] = []

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Sample images, and return the problems. What is no problem of one image alone is raised."""
        from tqdm import tqdm

        from ncsr_fast.data.images import read_image

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            ahead = [reader.submit(read_image, job.file) for job in jobs[:1]]
            for number, job in enumerate(tqdm(jobs, unit="image", disable=self.quiet or len(jobs) < 2)):
                read = ahead.pop()
                with self._problems_of(job):
                    image = read.result()
                ahead = [reader.submit(read_image, following.file) for following in jobs[number + 1 : number + 2]]
                if not read.exception():
                    with self._problems_of(job), warnings_about(job.file):
                        self._sample(job, image, writer)
            self._wait()
        return self.problems

    def _sample(self, job: Job, image: Tensor, writer: ThreadPoolExecutor) -> None:
        from ncsr_fast.metrics.fidelity import to_uint8

        broken = 0
        for group in self.sampler.groups(job.file, image):
            samples, broken = to_uint8(group.samples, self.sampler.args.to_8bit).cpu(), broken + group.broken
            if self.sampler.args.project:
                self.least_psnr = min(self.least_psnr, self.sampler.lr_psnr(samples, image))
            self._wait()
            targets = job.targets[group.first : group.first + len(samples)]
            self._behind.append((job, writer.submit(_write, job, targets, samples)))
        if broken:
            total = self.sampler.args.n
            advice = self.sampler.advice(image)
            self.problems.append(
                f"{broken} of {total} samples of {str(job.file)!r} have pixels that are not finite, which are black. {advice}"
            )

    def _wait(self) -> None:
        """Wait for what is being written."""
        behind, self._behind = self._behind, []
        for job, future in behind:
            with self._problems_of(job):
                future.result()

    @contextlib.contextmanager
    def _problems_of(self, job: Job) -> Iterator[None]:
        """Errors of one image, which is passed over, as problems."""
        from ncsr_fast.data.images import ImageError
        from ncsr_fast.flow.samples import NonFiniteSamples

        file, problem = str(job.file), None
        try:
            yield
        except (ImageError, FileNotFoundError) as error:
            problem = str(error)
        except NonFiniteSamples as error:
            problem = f"{file!r}: {error}"
        except OSError as error:
            if error.errno not in _OF_ONE:
                raise
            problem = f"{file!r}: {_OF_ONE[error.errno] or told(error)}"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = too_large(job.file, tile=self.sampler.args.tile)
        if problem and problem not in self.problems:
            self.problems.append(problem)


def _write(job: Job, targets: Sequence[Path], samples: Tensor) -> None:
    from ncsr_fast.data.images import write_image

    for target, sample in zip(targets, samples):
        write_image(target, sample)
        job.written += 1


class Group(NamedTuple):
    """Some of the samples of an image.

    Args:
        first: Number of the first.
        samples: (g, 3, sH, sW), with 0 for what is not finite.
        broken: How many of them are not finite somewhere.
    """

    first: int
    samples: Tensor
    broken: int


class Sampler:
    """Draws the samples of images as the command line asks.

    Args:
        model: The model.
        args: `n`, `temperature`, `seed`, `tile`, `on_nonfinite`, `project`, `to_8bit`.
    """

    def __init__(self, model: NCSR, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.device = next(model.parameters()).device
        self._tile = None if args.tile == "none" else args.tile
        self._temperature = args.temperature[0] if len(args.temperature) == 1 else args.temperature

    def advice(self, image: Tensor) -> str:
        """The reason why samples of an image, uint8 (3, H, W), blew up, and what to do."""
        from ncsr_fast.photographs import photograph_input

        return self.model.advice(photograph_input(self.model, image)[0])

    def lr_psnr(self, samples: Tensor, image: Tensor) -> float:
        """The least LR-PSNR in dB of samples (g, 3, sH, sW) of an image, all of them uint8."""
        from ncsr_fast.metrics.fidelity import lr_psnr

        return min(float(lr_psnr(sample[None], image[None], self.model.flow.scale)) for sample in samples)

    def groups(self, file: Path, image: Tensor) -> Iterator[Group]:
        """The samples of an image, uint8 (3, H, W), group by group: the same ones, however many a group has.

        Where memory runs out the groups are smaller from there on, down to one sample; then the error is raised.
        """
        from ncsr_fast.data.low_light import crop_margins
        from ncsr_fast.flow.estimate import samples_memory
        from ncsr_fast.photographs import photograph_input

        args = self.args
        lr, margins = photograph_input(self.model, image)
        memory = samples_memory(self.model, *lr.shape[2:], args.n, self._tile, keeps=True)
        together, first = self._together(memory), 0
        if memory.total > _TOLD:
            self._tell(file, lr, memory, together)
        generator = torch.Generator(self.device).manual_seed(args.seed)
        with torch.inference_mode():
            flow = self.model.condition(lr, tile=self._tile)
            while first < args.n:
                state, count = generator.get_state(), min(together, args.n - first)
                try:
                    group = self._group(flow, first, count, generator, memory.total > _TOLD)
                except (RuntimeError, MemoryError) as error:
                    if count == 1 or not is_out_of_memory(error):
                        raise
                    group = None  # outside of this block, which holds on to what was computed
                if group is None:
                    generator.set_state(state)
                    together = (count + 1) // 2
                else:
                    yield group._replace(samples=crop_margins(group.samples, margins))
                    first += count

    def _group(self, flow: ConditionedFlow, first: int, count: int, generator: torch.Generator, large: bool) -> Group:
        args = self.args
        with self._bar(first, count, large) as progress:
            samples = flow.sample(
                count,
                self._temperature,
                generator,
                tile=self._tile,
                on_nonfinite=args.on_nonfinite,
                project=args.project,
                progress=progress,
                first=first,
            )[0]
        broken = int((~torch.isfinite(samples)).flatten(1).any(dim=1).sum())
        return Group(first, samples.nan_to_num(0) if broken else samples, broken)

    def _together(self, memory: SamplesMemory) -> int:
        """How many samples are decoded together: all where one that blew up is drawn again, after all, or leaves all out."""
        free = free_bytes(self.device)
        if free is None or self.args.on_nonfinite in ("retry", "raise"):
            return self.args.n
        room = free // _USABLE - (memory.total - self.args.n * memory.sample)
        return max(1, min(self.args.n, room // memory.sample))

    def _tell(self, file: Path, lr: Tensor, memory: SamplesMemory, together: int) -> None:
        from tqdm import tqdm

        height, width = lr.shape[2:]
        scale, n = self.model.flow.scale, self.args.n
        taken = memory.total - (n - together) * memory.sample
        how = [f"{together} samples at a time"] if together < n else []
        how += ["in tiles"] if memory.tiled else []
        tqdm.write(
            f"{file}: {width}×{height} → {scale * width}×{scale * height}, about {taken / _GIB:.1f} GiB"
            f"{', ' if how else ''}{', '.join(how)}",
            file=sys.stderr,
        )

    @contextlib.contextmanager
    def _bar(self, first: int, count: int, large: bool) -> Iterator[object]:
        """A context with a function for `progress`, which draws a bar for a large image; None for a small one."""
        if not large:
            yield None
            return
        from tqdm import tqdm

        numbers = f"sample {first + 1}" if count == 1 else f"samples {first + 1} to {first + count}"
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=1.0, desc=numbers, leave=False, bar_format=layout) as bar:
            yield lambda done: bar.update(done - bar.n)
