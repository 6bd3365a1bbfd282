"""Decoding and encoding level by level in tiles: the same results as without, in little memory beside that of the images.

Between levels the whole state is stored. Of a level a tile at a time is planned and evaluated, for all samples, with the halo
that makes it exact (`ncsr_fast.engine.tiles`); latents are those of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ncsr_fast.engine.condition import resized_noise
from ncsr_fast.engine.memory import budget
from ncsr_fast.engine.peaks import Peaks, largest
from ncsr_fast.engine.tiles import Span, halo, spans
from ncsr_fast.flow.conditioned import Levels
from ncsr_fast.flow.walk import downward
from ncsr_fast.layout import in_a_graph
from ncsr_fast.memory import is_out_of_memory
from ncsr_fast.warn import warn_caller

Progress = Callable[[float], None]
Result = TypeVar("Result")


class Tiles(NamedTuple):
    """The tiles of a level.

    Args:
        side: The longest side of one, in pixels of the level.
        rows: Along the height.
        columns: Along the width.
    """

    side: int
    rows: list[Span]
    columns: list[Span]

    @property
    def are_one(self) -> bool:
        """True where the level is one tile."""
        return len(self.rows) == len(self.columns) == 1

    @property
    def pixels(self) -> int:
        """Pixels that are computed, those of halos as often as they are."""
        height, width = (sum(span.length for span in axis) for axis in (self.rows, self.columns))
        return height * width


class Tiling:
    """The choice of tiles for the levels of a flow, and decoding or encoding in them.

    Args:
        tile: LR pixels a side, or "auto": as large as the memory that is free allows.
        progress: Is told, after every tile, which part (0, 1] of the decoding is done.
        inverse: True for decoding.
    """

    def __init__(self, tile: int | str, progress: Progress | None = None, inverse: bool = True) -> None:
        self.tile, self._progress, self.inverse = tile, progress, inverse
        self._most: dict[int, int] = {}  # by level, the largest side after memory ran out
        self._work: dict[int, float] = {}  # by level, of one pass
        self._budget: int | None = None
        self._done, self._passes = 0.0, 1

    def begin(self, levels: Levels, passes: int) -> None:
        """Expect so many decodings of images as large as those of the levels."""
        self._done, self._passes = 0.0, passes
        self._work = {index: _work(levels, index, self.tiles(levels, index)) for index in range(len(levels.levels))}

    def decode(self, levels: Levels, latents: Sequence[Tensor], noise: Tensor | None, peaks: Peaks | None = None) -> Tensor:
        """The image of latents: as `Levels.decode`, without the log-det."""
        z = latents[-1]
        for index, _, latent in downward(levels.levels, latents):
            before = self._done
            run = partial(self._decoded, levels, index, z=z, latent=latent, noise=noise, peaks=peaks)
            z = self._within_memory(levels, index, run)
            self._done = before + self._work[index]
        return z

    def encode(self, levels: Levels, x: Tensor, noise: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Latents and log-det as `Levels.encode` returns them; nothing is recorded for gradients."""
        latents, logdets = [], []
        for index in range(len(levels.levels)):
            x, latent, logdet = self._within_memory(levels, index, partial(self._encoded, levels, index, x=x, noise=noise))
            logdets.append(logdet)
            latents += [] if latent is None else [latent]
        return (*latents, x), torch.stack(logdets).sum(dim=0)

    def tiles(self, levels: Levels, index: int) -> Tiles:
        """The tiles of a level."""
        height, width = levels.condition.features[index].size
        side, reach = self._side(levels, index), halo(levels.levels[index], self.inverse)
        if reach is None:
            if self.tile != "auto":
                raise ValueError(
                    f"level {index + 1} has networks that do not say their radius, so that tile must be None, not {self.tile!r}"
                )
            side, reach = max(height, width), 0
        multiple = levels.condition.features[index].multiple
        return Tiles(side, spans(height, side, reach, multiple), spans(width, side, reach, multiple))

    def _side(self, levels: Levels, index: int) -> int:
        if index in self._most:
            return self._most[index]
        if self.tile != "auto":
            return max(1, int(int(self.tile) * levels.config.level_scales()[index]))
        height, width = levels.condition.features[index].size
        pixel = levels.batch * levels.plan_bytes(index) + levels.walk_bytes(index)
        if self._budget is None:
            self._budget = budget(levels.device)
        affordable = self._budget // pixel
        if height * width <= affordable:
            return max(height, width)
        reach = halo(levels.levels[index], self.inverse) or 0
        return max(math.isqrt(affordable) - 2 * reach, _least(reach))

    def _within_memory(self, levels: Levels, index: int, run: Callable[[Tiles], Result]) -> Result:
        """A function of the tiles of a level; where memory runs out, of smaller ones."""
        while True:
            tiles = self.tiles(levels, index)
            try:
                return run(tiles)
            except (RuntimeError, MemoryError) as error:
                reach = halo(levels.levels[index], self.inverse)
                smaller = min(tiles.side, max(levels.condition.features[index].size)) // 2
                if not is_out_of_memory(error) or reach is None or smaller < min(_least(reach), tiles.side):
                    raise
            self._most[index] = smaller  # outside of the block, which holds on to what was computed
            done = "decoded" if self.inverse else "encoded"
            warn_caller(f"memory ran out at level {index + 1}, which is {done} in tiles of {smaller}×{smaller} of its pixels")

    def _decoded(
        self,
        levels: Levels,
        index: int,
        tiles: Tiles,
        *,
        z: Tensor,
        latent: Tensor | None,
        noise: Tensor | None,
        peaks: Peaks | None,
    ) -> Tensor:
        if tiles.are_one:
            seen = None if peaks is None else Peaks()
            x, _ = levels.decode_level(index, levels.plan(index, inverse=True), z, latent, noise, seen)
            _add(peaks, [] if seen is None else [seen])
            self._report(1.0, index)
            return x
        if noise is not None:  # resized as a whole; resizing a part again to its own size changes nothing
            noise = resized_noise(noise, levels.condition.features[index].size)
        done, found, bands = 0, [], []
        for rows in tiles.rows:
            band = []
            for columns in tiles.columns:
                seen = None if peaks is None else Peaks(rows.inner, columns.inner)
                band.append(_decoded_core(levels, index, rows, columns, z, latent, noise, seen))
                found += [] if seen is None else [seen]
                done += rows.length * columns.length
                self._report(done / tiles.pixels, index)
            bands.append(torch.cat(band, dim=3))
        _add(peaks, found)
        return torch.cat(bands, dim=2)

    def _encoded(
        self, levels: Levels, index: int, tiles: Tiles, *, x: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """A level, in its tiles: the state of the next one, the split's latent and the log-det, each of the tiles' cores."""
        if tiles.are_one:
            return levels.plan(index, inverse=False).encode(x, noise)
        if noise is not None:  # resized as a whole, as for decoding
            noise = resized_noise(noise, levels.condition.features[index].size)
        logdets = []
        bands: list[list[Tensor]] = [[], []]  # of the state, and of the latent
        for rows in tiles.rows:
            band: list[list[Tensor]] = [[], []]
            for columns in tiles.columns:
                *cores, logdet = _encoded_core(levels, index, rows, columns, x, noise)
                logdets.append(logdet)
                for parts, core in zip(band, cores):
                    parts += [] if core is None else [core]
            for joined, parts in zip(bands, band):
                joined += [torch.cat(parts, dim=3)] if parts else []
        z, *latents = (torch.cat(joined, dim=2) for joined in bands if joined)
        return z, latents[0] if latents else None, torch.stack(logdets).sum(dim=0)

    def _report(self, part: float, index: int) -> None:
        """Tell that so much of a level is done."""
        if self._progress is not None:
            total = self._passes * sum(self._work.values())
            self._progress(min(1.0, (self._done + part * self._work[index]) / total))


def tiling(tile: int | str | None, progress: Progress | None, levels: Levels, latents: Sequence[Tensor]) -> Tiling | None:
    """The tiling that an argument `tile` asks for; None: images are decoded whole.

    So they are by "auto" where gradients are recorded, whose backward pass needs what all tiles have computed, and in graphs,
    which are made once for a size.
    """
    if tile == "auto":
        recorded = levels.records or (torch.is_grad_enabled() and any(latent.requires_grad for latent in latents))
        if recorded or in_a_graph():
            tile = None
    return None if tile is None else Tiling(tile, progress)


def encoding_tiling(tile: int | str | None, levels: Levels, x: Tensor, noise: Tensor | None) -> Tiling | None:
    """The tiling that an argument `tile` asks for, of encoding x with a noise condition; None: it is encoded whole.

    So it is by "auto" where gradients are recorded, and in graphs.

    Raises:
        ValueError: A number where gradients are recorded, which tiles have none of.
    """
    if tile is None:
        return None
    inputs = [x] if noise is None else [x, noise]
    recorded = levels.records or (torch.is_grad_enabled() and any(each.requires_grad for each in inputs))
    if tile != "auto" and recorded:
        raise ValueError(f"tile={tile!r} is for encoding without gradients: call it under torch.no_grad(), or with tile=None")
    return None if recorded or in_a_graph() else Tiling(tile, inverse=False)


def _decoded_core(
    levels: Levels,
    index: int,
    rows: Span,
    columns: Span,
    z: Tensor,
    latent: Tensor | None,
    noise: Tensor | None,
    peaks: Peaks | None,
) -> Tensor:
    """The core of a tile of a level, decoded. The plan of the tile is freed at the end, before that of the next is made."""
    crop = (..., rows.crop, columns.crop)
    own_latent, own_noise = (None if tensor is None else tensor[crop] for tensor in (latent, noise))
    planned = levels.region_plan(index, rows.crop, columns.crop)
    x, _ = levels.decode_level(index, planned, z[crop], own_latent, own_noise, peaks)
    squeeze = levels.levels[index].squeeze
    return x[..., _times(rows.inner, squeeze), _times(columns.inner, squeeze)].clone()


def _encoded_core(
    levels: Levels, index: int, rows: Span, columns: Span, x: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The core of a tile of a level, encoded, its latent and its log-det. The plan of the tile is freed at the end."""
    squeeze = levels.levels[index].squeeze
    planned = levels.region_plan(index, rows.crop, columns.crop, inverse=False)
    own = x[..., _times(rows.crop, squeeze), _times(columns.crop, squeeze)]
    own_noise = None if noise is None else noise[..., rows.crop, columns.crop]
    z, latent, logdet = planned.encode(own, own_noise, (rows.inner, columns.inner))
    return z.clone(), None if latent is None else latent.clone(), logdet


def _least(reach: int) -> int:
    """The smallest side that tiles with such a halo get without being asked for: of smaller ones nearly all is halo."""
    return max(4, reach // 2)


def _work(levels: Levels, index: int, tiles: Tiles) -> float:
    """The cost of decoding a level, in units of its own."""
    return float(tiles.pixels * (levels.plan_bytes(index) + levels.walk_bytes(index)))


def _times(inner: slice, factor: int) -> slice:
    return slice(inner.start * factor, inner.stop * factor)


def _add(peaks: Peaks | None, found: Sequence[Peaks]) -> None:
    """Add the peaks of all tiles of a level to those of the levels before."""
    if peaks is not None:
        peaks += largest(found)
