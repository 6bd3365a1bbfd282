"""Random crops of images; crop number n is the same in every run."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ncsr_fast.data.cache import ImageCache
from ncsr_fast.data.degradation import load_degradation
from ncsr_fast.data.images import ImageError
from ncsr_fast.data.low_light import equalize
from ncsr_fast.data.sources import Source, list_sources, read_source, source_size
from ncsr_fast.data.workers import leave_signals

_NAMED = 5  # broken files that a warning names
_PREFETCHED = 4  # batches that each worker prepares ahead, enough for the time of decoding a few large images

Place = str | os.PathLike


class RandomCrops(Dataset):
    """Item n is a random crop of an image of the n-th place in an endless shuffle.

    An item is {"hr": uint8 (3, crop, crop)}, with {"lr": uint8 (3, crop/scale, crop/scale)} if there are `lr_images` or
    there is a degradation of one's own, and {"equalized": like "lr"} if asked for.

    Files that cannot be read and images smaller than a crop are left out with a warning that counts and names
    them, at the start for what the header tells, later (by each worker process) for the rest; ValueError when none
    is left.

    Args:
        images: Places of HR images, one or several: folders, searched recursively, and published `.pklv4` files.
        lr_images: Places of their LR counterparts, one for each of `images` and of its kind; () where there are none.
        scale: Of the pair; crops start at multiples of it.
        crop: Side of an HR crop, a multiple of 2·scale.
        seed: With the item's number it decides everything: a run resumed at item n goes on as it would have.
        degradation: Makes the LR crop: what `load_degradation` takes. "bicubic" is left to `to_pair`, on the device.
        equalize: With `lr_images` alone: items have the LR crop of the image after `ncsr_fast.data.equalize` too, whose
            histogram is the whole image's. For low-light models, whose scale is 1.
        cache_folder, cache_bytes: Where decoded image files are kept, and how many bytes of them: see `ImageCache`. None or
            0: each is decoded every time.

    Raises:
        FileNotFoundError: A folder or file that is not there.
        ValueError: Arguments that do not fit together.
    """

    def __init__(
        self,
        images: Place | Sequence[Place],
        lr_images: Place | Sequence[Place] = (),
        *,
        scale: int,
        crop: int = 160,
        seed: int = 0,
        degradation: str | Callable[[Tensor, int, torch.Generator], Tensor] = "bicubic",
        equalize: bool = False,
        cache_folder: str | os.PathLike | None = None,
        cache_bytes: int = 0,
    ) -> None:
        if crop < 1 or crop % (2 * scale):
            raise ValueError(f"crop must be a positive multiple of 2·scale = {2 * scale}, not {crop!r}")
        if equalize and not _places(lr_images):
            raise ValueError("equalize needs lr_images: the histogram is that of a whole image, and what is degraded is a crop")
        self.scale, self.crop, self.seed, self.equalize = scale, crop, seed, equalize
        self.degradation = load_degradation(degradation)
        self.broken: dict[str, str] = {}
        self._order: tuple[int, list[int]] | None = None
        self.places = (*_places(images), *_places(lr_images))
        listed = list_sources(_places(images), _places(lr_images))
        if lr_images and self.degradation is not None:
            raise ValueError(
                f"degradation {degradation!r} makes LR images, but lr_images names LR images too: give one of the two"
            )
        self.sizes: dict[Source, tuple[int, int]] = {}
        self.files = [files for files in listed if self._usable(files)]
        if self.broken:
            self._warn(list(self.broken.values()), len(listed))
        if not self.files:
            places = ", ".join(repr(str(place)) for place in _places(images))
            raise ValueError(f"no usable image is left in {places}: {next(iter(self.broken.values()))}")
        self._cache: ImageCache | None = None
        if cache_folder is not None:
            self.keep_decoded(cache_folder, cache_bytes)

    def __len__(self) -> int:
        """Number of images; the number of items is not bounded."""
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = random.Random(f"{self.seed}/{number}")
        _, images = self._drawn(number)
        side, (height, width) = self.crop, images[0].shape[1:]
        top = draw.randint(0, (height - side) // self.scale) * self.scale
        left = draw.randint(0, (width - side) // self.scale) * self.scale
        if self.equalize:
            images.append(equalize(images[1]))
        item = {}
        for name, image, ratio in zip(("hr", "lr", "equalized"), images, (1, self.scale, self.scale)):
            window = image[:, top // ratio : (top + side) // ratio, left // ratio : (left + side) // ratio]
            # copied even if contiguous, because it may be a view of the cache
            item[name] = window.clone(memory_format=torch.contiguous_format)
        if self.degradation is not None:
            generator = torch.Generator().manual_seed(draw.getrandbits(63))
            item["lr"] = self.degradation(item["hr"], self.scale, generator)
        return item

    def batch(self, step: int, batch: int) -> dict[str, Tensor]:
        """The whole batch of a training step, over all processes, stacked; raise ValueError if `batch` is less than 1."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch!r}")
        return default_collate([self[number] for number in range(step * batch, (step + 1) * batch)])

    def name(self, number: int) -> str:
        """The name of the HR image that item `number` is a crop of."""
        files, _ = self._drawn(number)
        return str(files[0])

    def keep_decoded(self, folder: str | os.PathLike, limit: int) -> None:
        """Cache decoded images in `folder`, at most `limit` bytes of them (0: none): see `ImageCache`."""
        file_sizes = {image: size for image, size in self.sizes.items() if isinstance(image, Path)}
        if limit > 0 and file_sizes:
            self._cache = ImageCache(folder, limit, file_sizes)

    def forget(self) -> None:
        """Delete the decoded images on disk."""
        if self._cache is not None:
            self._cache.remove()

    def _drawn(self, number: int) -> tuple[tuple[Source, ...], list[Tensor]]:
        """The image (pair) of item `number`, or the next readable image after it, with its pixels."""
        start = self._shuffled(number)
        for offset in range(len(self.files)):
            files = self.files[(start + offset) % len(self.files)]
            if str(files[0]) in self.broken:
                continue
            try:
                images = [self._read(image) for image in files]
                self._check_pair(files, [tuple(image.shape[1:]) for image in images])
                return files, images
            except (ImageError, OSError, MemoryError) as error:
                self.broken[str(files[0])] = reason = str(error) or f"{str(files[0])!r} does not fit in memory"
                self._warn([reason], len(self.files))
        raise ValueError(f"no usable image is left: all {len(self.files)} are broken")

    def _shuffled(self, number: int) -> int:
        epoch, position = divmod(number, len(self.files))
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.files)))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][position]

    def _read(self, image: Source) -> Tensor:
        if self._cache is None or not isinstance(image, Path):
            return read_source(image)
        return self._cache.read(image)

    def _usable(self, files: tuple[Source, ...]) -> bool:
        """True if an image (pair) fits by its headers; the sizes are added to `self.sizes`."""
        try:
            found = [source_size(image) for image in files]
            self._check_pair(files, found)
        except (ImageError, OSError) as error:  # OSError if the file was removed since it was listed
            self.broken[str(files[0])] = str(error)
            return False
        self.sizes.update(zip(files, found))
        return True

    def _check_pair(self, files: tuple[Source, ...], sizes: list[tuple[int, int]]) -> None:
        height, width = sizes[0]
        if min(height, width) < self.crop:
            raise ImageError(f"{str(files[0])!r} is {height}×{width}, smaller than a {self.crop}×{self.crop} crop")
        if len(sizes) == 2 and sizes[1] != (height // self.scale, width // self.scale):
            raise ImageError(
                f"{str(files[1])!r} is {sizes[1][0]}×{sizes[1][1]}, not 1/{self.scale} of its HR image's {height}×{width}"
            )

    @staticmethod
    def _warn(errors: list[str], total: int) -> None:
        named = "\n  ".join(errors[:_NAMED]) + ("\n  …" if len(errors) > _NAMED else "")
        warnings.warn(f"{len(errors)} of {total} images are skipped:\n  {named}", stacklevel=3)


class _Share(Sampler[int]):
    """A process's contiguous share of the item numbers of the batches of steps first … stop - 1."""

    def __init__(self, batch: int, first: int, stop: int, rank: int, world: int) -> None:
        self._batch, self._steps = batch, range(first, stop)
        self._share = range(rank * batch // world, (rank + 1) * batch // world)

    def __iter__(self) -> Iterator[int]:
        return (step * self._batch + place for step in self._steps for place in self._share)

    def __len__(self) -> int:
        return len(self._steps) * len(self._share)


def crop_loader(
    crops: RandomCrops, batch: int, first_step: int, stop_step: int, workers: int = 0, rank: int = 0, world: int = 1
) -> DataLoader:
    """The batches of training steps first_step … stop_step - 1; a step's batch does not depend on `first_step`.

    Args:
        crops: The crops.
        batch: Number of crops of a step, over all `world` processes together. Each process reads a contiguous share of
            batch / world crops, so that a step's crops are the same for any number of processes.
        first_step: The first step.
        stop_step: The step after the last one.
        workers: Number of processes that read images, with one thread each; they leave SIGINT and SIGTERM to the main
            process. 0: images are read when they are asked for.
        rank: Rank of this process, from 0.
        world: Number of processes that train together.

    Raises:
        ValueError: `world` does not divide the batch, or the rank is not one of `world`.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be one of the {world} of world, 0 … {world - 1}, not {rank!r}")
    if batch < 1 or batch % world:
        raise ValueError(f"batch must be a positive multiple of the number of processes, {world}, not {batch!r}")
    return DataLoader(
        crops,
        batch_size=batch // world,
        sampler=_Share(batch, first_step, stop_step, rank, world),
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        worker_init_fn=leave_signals() if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _places(places: Place | Sequence[Place]) -> list[Path]:
    return [Path(place) for place in ([places] if isinstance(places, (str, os.PathLike)) else places)]
