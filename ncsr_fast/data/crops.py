"""Random crops of a folder of images, such that crop number n is the same in every run."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ncsr_fast.data.images import ImageError, image_size, list_images, pair_up, read_image

_NAMED = 5  # broken files a warning spells out


class RandomCrops(Dataset):
    """Item n is a random crop, flipped and turned at random, of an image of the n-th place in an endless shuffle.

    hr       folder of HR images, searched recursively
    lr       folder of their LR counterparts; None when the LR images are to be computed from the crops
    scale    of the pair; crops start at multiples of it
    crop     side of an HR crop, a multiple of 2·scale
    seed     with the item's number it decides everything: a run resumed at item n goes on as it would have
    cache    bytes of decoded images kept in memory (in each worker process)

    An item is {"hr": uint8 (3, crop, crop)} and, with `lr`, {"lr": uint8 (3, crop/scale, crop/scale)}.

    Files that cannot be read and images smaller than a crop are left out with a warning that counts and names
    them, at the start for what the header tells, later (by each worker process) for the rest; ValueError when none
    is left.
    """

    def __init__(
        self,
        hr: str | os.PathLike,
        lr: str | os.PathLike | None = None,
        *,
        scale: int,
        crop: int = 160,
        seed: int = 0,
        augment: bool = True,
        cache: int = 2**30,
    ) -> None:
        if crop < 1 or crop % (2 * scale):
            raise ValueError(f"crop must be a positive multiple of 2·scale = {2 * scale}, not {crop!r}")
        self.scale, self.crop, self.seed, self.augment = scale, crop, seed, augment
        self.broken: dict[str, str] = {}
        self._cache: dict[Path, Tensor] = {}
        self._room = cache
        self._order: tuple[int, list[int]] | None = None
        paths: list[tuple[Path, ...]] = [(path,) for path in list_images(hr)]
        if lr is not None:
            paths = list(pair_up([path for (path,) in paths], Path(hr), list_images(lr), Path(lr)))
        self.files = [files for files in paths if self._usable(files)]
        if self.broken:
            self._warn(list(self.broken.values()), len(paths))
        if not self.files:
            raise ValueError(f"no usable image is left in {str(hr)!r}")

    def __len__(self) -> int:
        """Number of images; items go on without end."""
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = random.Random(f"{self.seed}/{number}")
        images = self._images(number)
        side, (height, width) = self.crop, images[0].shape[1:]
        top = draw.randint(0, (height - side) // self.scale) * self.scale
        left = draw.randint(0, (width - side) // self.scale) * self.scale
        turns, flip = (draw.randrange(4), draw.random() < 0.5) if self.augment else (0, False)
        crops = []
        for image, ratio in zip(images, (1, self.scale)):
            window = image[:, top // ratio : (top + side) // ratio, left // ratio : (left + side) // ratio]
            window = torch.rot90(window, turns, dims=(1, 2))
            crops.append((window.flip(2) if flip else window).contiguous())
        return dict(zip(("hr", "lr"), crops))

    def _images(self, number: int) -> tuple[Tensor, ...]:
        """The image (pair) that `number` falls on, or the next readable one after it."""
        start = self._shuffled(number)
        for offset in range(len(self.files)):
            files = self.files[(start + offset) % len(self.files)]
            if str(files[0]) in self.broken:
                continue
            try:
                images = tuple(self._read(path) for path in files)
                self._check_pair(files, [tuple(image.shape[1:]) for image in images])
                return images
            except (ImageError, FileNotFoundError) as error:
                self.broken[str(files[0])] = str(error)
                self._warn([str(error)], len(self.files))
        raise ValueError(f"no usable image is left: all {len(self.files)} are broken")

    def _shuffled(self, number: int) -> int:
        epoch, position = divmod(number, len(self.files))
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.files)))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][position]

    def _read(self, path: Path) -> Tensor:
        image = self._cache.get(path)
        if image is None:
            image = read_image(path)
            if image.numel() <= self._room:
                self._room -= image.numel()
                self._cache[path] = image
        return image

    def _usable(self, files: tuple[Path, ...]) -> bool:
        try:
            self._check_pair(files, [image_size(path) for path in files])
            return True
        except ImageError as error:
            self.broken[str(files[0])] = str(error)
            return False

    def _check_pair(self, files: tuple[Path, ...], sizes: list[tuple[int, int]]) -> None:
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


class CountingSampler(Sampler[int]):
    """The item numbers start, start + 1, … stop - 1."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return max(0, self.stop - self.start)


def crop_loader(crops: RandomCrops, batch: int, first_step: int, steps: int, workers: int = 0) -> DataLoader:
    """The batches of training steps first_step … steps - 1, the same ones whatever `first_step` is."""
    return DataLoader(
        crops,
        batch_size=batch,
        sampler=CountingSampler(first_step * batch, steps * batch),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
