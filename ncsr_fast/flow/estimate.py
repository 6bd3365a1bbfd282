"""How much memory the samples of an image take, estimated before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from ncsr_fast.engine.memory import at_once, budget, spare_bytes
from ncsr_fast.engine.tiles import halo

if TYPE_CHECKING:
    from ncsr_fast.config import FlowConfig
    from ncsr_fast.flow.level import FlowLevel
    from ncsr_fast.model import NCSR

_STATES = 5  # of a sample that exist at a time: latents, the state before and behind a level, the image, what is clipped


class SamplesMemory(NamedTuple):
    """The memory of samples of one image.

    Args:
        total: Bytes, beside the weights; those as they are folded count.
        sample: Bytes that another sample takes.
        tiled: True where a level is decoded in several tiles.
    """

    total: int
    sample: int
    tiled: bool


def plan_bytes(level: FlowLevel, flow: FlowConfig, element: int) -> int:
    """Bytes a pixel of a level that the plan of decoding it stores, without a noise, in numbers of `element` bytes."""
    count = 0
    for branch in level.branches:
        if branch.condition == "features":
            count += (branch.steps or 0) * (2 * level.channels if branch.changes_all else flow.hidden_channels)
    return count * element


def walk_bytes(level: FlowLevel, flow: FlowConfig, element: int) -> int:
    """Bytes a pixel of a level, of one sample, that evaluating it takes: hidden layers, outputs and states."""
    return (2 * flow.hidden_channels + 8 * level.channels) * element


def samples_memory(model: NCSR, height: int, width: int, n: int, tile: int | str | None) -> SamplesMemory:
    """The memory that `model.sample` takes without gradients, for one LR image of a size.

    Args:
        model: The model.
        height: Of the LR image, as `width`.
        width: Of the LR image.
        n: Samples.
        tile: As for `NCSR.sample`.
    """
    flow, like = model.flow, model.inputs.like
    element = model.served.network_dtype(like.dtype).itemsize
    pixels = height * width
    levels = [_level_bytes(model, index, pixels, n, tile, element) for index in range(len(flow.levels))]
    sample = _STATES * flow.channels * flow.scale**2 * pixels * like.element_size()
    encoder = getattr(model.encoder, "condition_bytes", lambda size, tiled: 0)
    most = budget(like.device)
    in_tiles = tile is not None and (tile != "auto" or encoder(element, False) * pixels > most)
    features = encoder(element, in_tiles) * pixels
    folded = element * sum(weight.numel() for level in model.levels for weight in level.parameters())
    total = folded + features + max(size for size, _ in levels) + n * sample
    return SamplesMemory(total, sample, any(tiled for _, tiled in levels))


def _level_bytes(model: NCSR, index: int, lr_pixels: int, n: int, tile: int | str | None, element: int) -> tuple[int, bool]:
    """Bytes of what is computed at a level beside its state, and True where there are several tiles of it."""
    flow, device = model.flow, model.inputs.like.device
    level = cast("FlowLevel", model.levels[index])
    resolution, reach = flow.level_scales()[index], halo(level)
    plan, walk = plan_bytes(level, flow, element), walk_bytes(level, flow, element)
    pixels = crop = int(lr_pixels * resolution**2)
    if tile == "auto" and reach is not None:
        crop = min(pixels, budget(device) // (plan + walk))
    elif tile is not None and reach is not None:
        crop = min(pixels, (max(1, int(int(tile) * resolution)) + 2 * reach) ** 2)
    together = min(n * walk * crop, max(walk * crop, spare_bytes(device)))
    return crop * plan + together + min(at_once(device), crop * plan), crop < pixels
