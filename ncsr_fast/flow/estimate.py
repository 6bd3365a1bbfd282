"""How much memory the samples of an image take, estimated before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ncsr_fast.engine.condition import Condition, LevelFeatures
from ncsr_fast.engine.memory import budget
from ncsr_fast.flow.conditioned import Levels
from ncsr_fast.flow.level_memory import LevelMemory
from ncsr_fast.flow.tiling import Tiling

if TYPE_CHECKING:
    from ncsr_fast.flow.level import FlowLevel
    from ncsr_fast.model import NCSR

_SHOWN = 3.25  # images: decoded, clamped and returned, and a byte that says which values are finite


class SamplesMemory(NamedTuple):
    """The memory of samples of one image.

    Args:
        total: Bytes, beside the weights; those as they are folded count.
        sample: Bytes that another sample takes, on average.
        tiled: True where a level is decoded in several tiles.
    """

    total: int
    sample: int
    tiled: bool


class _Size(NamedTuple):
    """Of the features of a level, all that its tiles depend on: as of `ncsr_fast.engine.condition.LevelFeatures`."""

    size: torch.Size
    multiple: int
    batch: int = 1


class _Part(NamedTuple):
    """A level as it is decoded.

    Args:
        memory: Its terms.
        crop: Pixels of the largest tile, halo included.
        tiled: True for several tiles.
        made: True where own features are made for every tile.
        state: Bytes of the state of a sample, ahead of the level's split.
        given: Bytes of that behind it, which decoding begins with, beside the latents.
    """

    memory: LevelMemory
    crop: int
    tiled: bool
    made: bool
    state: int
    given: int


def samples_memory(model: NCSR, height: int, width: int, n: int, tile: int | str | None, keeps: bool = False) -> SamplesMemory:
    """The memory that `model.sample` takes without gradients, for one LR image of a size.

    Args:
        model: The model.
        height: Of the LR image, as `width`.
        width: Of the LR image.
        n: Samples.
        tile: As for `NCSR.sample`.
        keeps: True: of the `sample` of `model.condition(lr)`, which caches plans.
    """
    call = _Call(model, height, width, tile, keeps)
    total = call.most(n)
    another = call.most(2) - total if n == 1 else (total - call.most(1)) // (n - 1)
    return SamplesMemory(total, max(1, another), any(part.tiled for part in call.parts))


class _Call:
    """The samples of one LR image, before anything of them is computed; arguments as of `samples_memory`."""

    def __init__(self, model: NCSR, height: int, width: int, tile: int | str | None, keeps: bool) -> None:
        flow, like, options = model.flow, model.inputs.like, model.served
        element = options.network_dtype(like.dtype).itemsize
        height, width = (-(-side // flow.lr_multiple) * flow.lr_multiple for side in (height, width))
        pixels, encoder, scales = height * width, model.encoder, flow.level_scales()
        self.image = flow.channels * flow.scale**2 * pixels * like.element_size()
        self.shown = _SHOWN + (flow.base is not None)
        whole, tiled = (_bytes(encoder, "condition_bytes", element, each) * pixels for each in (False, True))
        in_tiles = hasattr(encoder, "condition_in_tiles") and tile is not None
        in_tiles = in_tiles and (tile != "auto" or whole > budget(like.device))
        self.encoding = tiled if in_tiles else whole
        self.features = _bytes(encoder, "feature_bytes", element, in_tiles) * pixels
        sizes = [torch.Size([int(side * scale) for side in (height, width)]) for scale in scales]
        found = [cast(LevelFeatures, _Size(size, max(1, int(scale)))) for size, scale in zip(sizes, scales)]
        self.levels = Levels(cast("list[FlowLevel]", list(model.levels)), flow, Condition(found), options, keeps)
        tiling = None if tile is None else Tiling(tile)
        self.parts: list[_Part] = []
        for index, (level, (rows, columns), scale) in enumerate(zip(self.levels.levels, sizes, scales)):
            crop, split = rows * columns, False
            if tiling is not None:
                tiles = tiling.tiles(self.levels, index)
                crop = max(span.length for span in tiles.rows) * max(span.length for span in tiles.columns)
                split = not tiles.are_one
            own = getattr(encoder, "channels", level.config.condition_channels)
            memory = LevelMemory(level, flow, options, own, scale)
            state = rows * columns * like.element_size()
            given = level.channels - level.split_channels if index < len(scales) - 1 else 0  # the last one's is a latent
            self.parts.append(_Part(memory, crop, split, in_tiles and scale > 1, level.channels * state, given * state))

    def most(self, n: int) -> int:
        """The most bytes at any time of n samples."""
        return int(max(self.encoding, *self._phases(n)))

    def _phases(self, n: int) -> Iterator[float]:
        """Bytes at the times that may be the peak: folding, planning and evaluating every level, and the images' end."""
        stored, latents = self.features, n * self.image  # of levels decoded before too: folded weights, plans in the cache
        for index, part in reversed(list(enumerate(self.parts))):
            memory, crop, weights = part.memory, part.crop, part.memory.weights()
            there = latents + n * part.given
            yield stored + there + weights.mixing
            grown = memory.grown(crop) if part.made else 0
            stored += weights.stored
            yield stored + there + max(weights.folding + grown, memory.growing(crop) if part.made else 0)
            together = min(n, self.levels.samples_at_once(index, crop))
            outputs = n * part.state if part.tiled or together < n else 0  # of tiles and samples decoded, then joined
            plan = memory.plan(crop) + grown
            yield stored + there + n * part.state * part.tiled + memory.planning(crop) + grown
            yield stored + there + outputs + plan + together * memory.walk(crop)
            yield stored + there + 2 * outputs + (0 if part.tiled else plan)
            stored += plan if self.levels.keeps and not part.tiled else 0
        yield stored + n * self.shown * self.image


def _bytes(encoder: Any, name: str, element: int, tiled: bool) -> int:
    """Bytes an LR pixel that an encoder says; 0 of one that does not."""
    return int(getattr(encoder, name)(element, tiled)) if hasattr(encoder, name) else 0
