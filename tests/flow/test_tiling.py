"""Decoding in tiles: equal to decoding whole, in less memory, whatever the tiles."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from operator_cases import marked
from support import image, relative_error, tiny_model
from torch import Tensor
from variants import BRANCHES, FLOW, NOISY, OwnNetworks, model_of

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.encoder.blocks import ENGINE
from ncsr_fast.encoder.tiled import TiledBlock
from ncsr_fast.engine import tiles
from ncsr_fast.engine.peaks import Peaks
from ncsr_fast.flow.conditioned import Levels
from ncsr_fast.flow.estimate import samples_memory
from ncsr_fast.flow.networks import NETWORKS, StackedNetworks
from ncsr_fast.flow.tiling import Tiling
from ncsr_fast.memory import peak_bytes

EXACT = 1e-9  # in float64: of sums in another order, which the steps of a flow amplify
X8 = dict(scale=8, noise_steps=(0, 0, 1, 1))
MODELS: dict[str, dict] = {
    "ncsr-x4": {},
    "ncsr-x8": X8,
    "srflow-x4": dict(noise_channels=0, noise_steps=()),
    "srflow-x8": dict(X8, noise_channels=0, noise_steps=()),
    "std": dict(noise_channels=1),
    "all levels": dict(noise_steps=(1, 1, 1)),
    "two steps": dict(steps=2, noise_steps=(0, 1, 2)),
    "fs-ncsr": dict(system="fs-ncsr"),
    "srflow-da": dict(system="srflow-da", noise_channels=0, noise_steps=()),
    "srflow-da-s": dict(system="srflow-da-s", noise_channels=0, noise_steps=(), steps=8),
    "ctflow": dict(system="ctflow", scale=1, noise_channels=0, noise_steps=()),
    "llflow": dict(system="llflow", scale=1, noise_channels=0, noise_steps=()),
}


def healthy(**changes) -> NCSR:
    """A small model of random weights whose inverse is a contraction nowhere near the bounds of float64."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for level in model.levels:
            for branch in level.branches:
                level.networks(branch).conv3.mul_(0.3)
    return model


def drawn(model: NCSR, lr: Tensor, n: int = 1) -> list[Tensor]:
    """Latents of n images of each LR image."""
    shapes = model.latent_shapes(*lr.shape[2:])
    return [image(n * len(lr), *shape, seed=index).sub_(0.5) for index, shape in enumerate(shapes)]


def noise_for(model: NCSR, lr: Tensor) -> Tensor | None:
    """A noise condition as the model has it."""
    channels, scale = model.flow.noise_channels, model.flow.scale
    if not channels:
        return None
    size = (1, 1) if channels == 1 else (scale * lr.shape[2], scale * lr.shape[3])
    return image(len(lr), channels, *size, seed=9) * 0.1


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@marked("slow", lambda name, side: side == 1 and name not in ("ncsr-x4", "srflow-da"))
@torch.no_grad()
def test_tiles_change_nothing(name, side):
    model = healthy(**MODELS[name])
    lr = image(1 if side == 1 else 2, model.flow.lr_channels, 5, 9, seed=1)
    latents, noise = drawn(model, lr), noise_for(model, lr)
    expected = model.decode(latents, lr, noise)
    assert expected.abs().max() < 100
    assert relative_error(model.decode(latents, lr, noise, tile=side), expected) < EXACT


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (23, 2), (16, 16)])
@torch.no_grad()
def test_borders_and_sizes(size):
    model = healthy()
    lr = image(1, 3, *size, seed=1)
    latents, noise = drawn(model, lr, 3), noise_for(model, lr)
    expected = model.decode(latents, lr, noise)
    for side in (4, 100):
        assert relative_error(model.decode(latents, lr, noise, tile=side), expected) < EXACT


@pytest.mark.parametrize("engine", ["fused", "plain"])
@torch.no_grad()
def test_a_flow_of_ones_own_in_tiles(engine):
    """Other branches in another order, a level without features, features without stacked ones, a prior's mean, a base."""
    model = model_of(engine=engine)
    lr = image(2, 3, 6, 10, seed=2)
    arguments = dict(n=2, temperature=0.3, tile=None)
    expected = model.sample(lr, generator=torch.Generator().manual_seed(0), **arguments)
    for side in (1, 5):
        found = model.sample(lr, generator=torch.Generator().manual_seed(0), **{**arguments, "tile": side})
        assert relative_error(found, expected) < EXACT


@torch.no_grad()
def test_networks_that_do_not_say_how_far_they_reach(monkeypatch):
    monkeypatch.setitem(NETWORKS, "own", lambda *sizes: OwnNetworks(StackedNetworks(*sizes)))
    first = replace(FLOW.levels[0], branches=tuple(replace(branch, network="own") for branch in BRANCHES))
    model = model_of(replace(FLOW, levels=(first, *FLOW.levels[1:])))
    lr = image(1, 3, 4, 6, seed=2)
    with pytest.raises(ValueError, match="level 1 has networks that do not say their radius, so that tile must be None, not 2"):
        model.sample(lr, 1, tile=2)
    whole, auto = (model.sample(lr, 1, generator=torch.Generator().manual_seed(0), tile=tile) for tile in (None, "auto"))
    assert torch.equal(whole, auto)


def reach(levels: Levels, index: int) -> list[int]:
    """How far above and below a row of a level its decoded pixels depend on the state."""
    level, (height, width) = levels.levels[index], levels.condition.features[index].size
    z = image(1, level.channels - level.split_channels, height, width, seed=2).requires_grad_()
    latent = image(1, level.split_channels, height, width, seed=3) if level.split_channels else None
    x, _ = levels.plan(index, inverse=True).decode(z, latent)
    row = height // 2
    x[0, :, 2 * row].sum().backward()
    reached = z.grad.abs().amax(dim=(0, 1, 3)).nonzero().flatten()
    return [row - int(reached.min()), int(reached.max()) - row]


@pytest.mark.parametrize("name", ["ncsr-x4", "two steps", "srflow-da"])
def test_the_halo_is_as_wide_as_pixels_depend_on_each_other(name):
    """Every pixel in it counts, and none outside."""
    model = healthy(**MODELS[name])
    with torch.no_grad():
        levels = model.conditioned_levels(image(1, 3, 24, 24, seed=1))
    assert [reach(levels, index) for index in range(len(model.levels))] == [[tiles.halo(level)] * 2 for level in model.levels]


def test_the_halo_of_a_split_that_couplings_read():
    """It takes more than half of the channels, so that the mean of the others is passed through couplings."""
    first = replace(FLOW.levels[0], branches=(BRANCHES[0], NOISY), split_channels=8)
    model = model_of(replace(FLOW, levels=(first, FLOW.levels[1])))
    with torch.no_grad():
        levels = model.conditioned_levels(image(1, 3, 24, 24, seed=1))
    assert reach(levels, 0) == [tiles.halo(model.levels[0])] * 2 == [5, 5]


@pytest.mark.parametrize(
    "size, side, halo, multiple", [(7, 3, 2, 1), (16, 1, 3, 4), (16, 5, 1, 2), (1, 1, 9, 1), (12, 9, 2, 4)]
)
def test_tiles_cover_every_pixel_once_with_their_halo(size, side, halo, multiple):
    found = tiles.spans(size, side, halo, multiple)
    assert [pixel for span in found for pixel in range(span.core.start, span.core.stop)] == list(range(size))
    for span in found:
        assert span.core.stop - span.core.start <= max(side, multiple)
        assert span.crop.start <= max(0, span.core.start - halo) and span.crop.stop >= min(size, span.core.stop + halo)
        assert span.crop.start % multiple == span.crop.stop % multiple == 0
        assert range(size)[span.crop][span.inner] == range(size)[span.core]


def test_the_halo_of_a_block():
    """As far as its output depends on its input, however little there."""
    block = tiny_model().encoder.body[0]
    x = image(1, 4, 40, 3, seed=1).requires_grad_()
    block(x, None)[0, :, 20].sum().backward()
    reached = x.grad.abs().amax(dim=(0, 1, 3)).nonzero().flatten()
    assert [20 - int(reached.min()), int(reached.max()) - 20] == [TiledBlock(block, 1).halo] * 2 == [15, 15]


@torch.no_grad()
def test_the_encoder_in_tiles():
    """With blocks in tiles, all features, and those of a region, are the whole image's."""
    model = tiny_model(**X8)
    lr = image(2, 3, 24, 32, seed=1)
    whole, found = model.encoder.condition(lr), model.encoder.condition_in_tiles(lr, ENGINE, 7)
    for expected, features in zip(whole.features, found.features, strict=True):
        assert features.size == expected.size and features.multiple == expected.multiple and features.batch == 2
        assert relative_error(features.whole.joined, expected.joined) < EXACT
        rows, columns = (slice(side // 8 * 2, side // 8 * 6) for side in expected.size)
        for each in (features, expected, features.sample(1)):
            region = each.region(rows, columns).joined
            assert relative_error(region, expected.joined[2 - len(region) :, :, rows, columns]) < EXACT


def test_states_are_watched_in_the_tiles_and_not_in_their_halos():
    """The largest states of tiles are those of the image; what is computed near the cut of a tile is no state of it."""
    model = healthy(steps=2, noise_steps=(0, 1, 2))
    lr = image(1, 3, 9, 12, seed=1)
    latents = drawn(model, lr, 2)
    with torch.no_grad():
        levels = model.conditioned_levels(model.padded(lr))
        expected, found = Peaks(), Peaks()
        levels.decode(latents, None, expected)
        tiles = Tiling(2)
        tiles.begin(levels, 1)
        tiles.decode(levels, latents, None, found)
    assert len(found) == len(expected) == 6
    for peak, wanted in zip(found, expected):
        torch.testing.assert_close(peak, wanted, rtol=1e-12, atol=0)


@torch.no_grad()
def test_samples_in_tiles_are_those_of_the_whole_image():
    model = healthy()
    lr = image(2, 3, 7, 9, seed=1)
    told: list[float] = []

    def draw(tile, progress=None) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return model.sample(lr, 3, 0.2, generator, tile, progress=progress)

    assert relative_error(draw(3, told.append), draw(None)) < EXACT
    assert told == sorted(told) and 0 < told[0] < 0.1 and told[-1] == pytest.approx(1, abs=1e-12)
    assert relative_error(model.condition(lr).sample(3, 0.2, torch.Generator().manual_seed(5), tile=3), draw(None)) < EXACT


def test_gradients_in_tiles():
    model = healthy()
    lr = image(1, 3, 5, 8, seed=1)
    latents = [latent.requires_grad_() for latent in drawn(model, lr)]
    whole = torch.autograd.grad(model.decode(latents, lr).sin().sum(), [*latents, model.levels[0].invconv])
    parts = torch.autograd.grad(model.decode(latents, lr, tile=3).sin().sum(), [*latents, model.levels[0].invconv])
    for part, expected in zip(parts, whole):
        assert relative_error(part, expected) < EXACT


@pytest.mark.parametrize(
    "bad, error", [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("all", ValueError), (True, TypeError)]
)
def test_tiles_that_are_none(bad, error):
    model, lr = tiny_model(), image(1, 3, 2, 2)
    for call in (lambda: model.sample(lr, 1, tile=bad), lambda: model.decode(drawn(model, lr), lr, tile=bad)):
        with pytest.raises(error, match="tile must be"):
            call()


def limited(room: int):
    """The operators' plans of levels with more pixels than `room` run out of memory."""
    plan, region = Levels.plan, Levels.region_plan

    def whole(levels, index, inverse):
        height, width = levels.condition.features[index].size
        return region_of(levels, index, slice(0, height), slice(0, width)) and plan(levels, index, inverse)

    def region_of(levels, index, rows, columns):
        if (rows.stop - rows.start) * (columns.stop - columns.start) > room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")
        return region(levels, index, rows, columns)

    return mock.patch.multiple(Levels, plan=whole, region_plan=region_of)


@pytest.mark.parametrize("tile", ["auto", 16])
@torch.no_grad()
def test_less_memory_than_was_there_makes_smaller_tiles(tile):
    model = healthy()
    lr = image(1, 3, 16, 16, seed=1)
    expected = model.sample(lr, 2, 0.2, torch.Generator().manual_seed(0), None)
    with limited(600), pytest.warns(RuntimeWarning) as caught:
        found = model.sample(lr, 2, 0.2, torch.Generator().manual_seed(0), tile)
    assert relative_error(found, expected) < EXACT
    told = [str(warning.message) for warning in caught]
    assert told == ["memory ran out at level 1, which is decoded in tiles of 16×16 of its pixels"]
    with limited(600), pytest.raises(RuntimeError, match="can't allocate memory"):
        model.sample(lr, 2, 0.2, torch.Generator().manual_seed(0), None)
    with limited(10), warnings.catch_warnings(), pytest.raises(RuntimeError, match="can't allocate memory"):
        warnings.simplefilter("ignore")
        model.sample(lr, 2, 0.2, torch.Generator().manual_seed(0), tile)


@pytest.mark.parametrize("free, whole", [(2**40, True), (4 * 2**20, False)])
@torch.no_grad()
def test_auto_has_tiles_where_free_memory_is_little(free, whole, monkeypatch):
    monkeypatch.setattr("ncsr_fast.engine.memory.free_bytes", lambda device: free)
    model = healthy(blocks=3, channels=16)
    lr = image(1, 3, 48, 40, seed=1)
    calls = mock.Mock(wraps=model.encoder.condition_in_tiles)
    monkeypatch.setattr(model.encoder, "condition_in_tiles", calls)
    with mock.patch.object(Levels, "region_plan", autospec=True, side_effect=Levels.region_plan) as planned:
        found = model.sample(lr, 1, 0.2, torch.Generator().manual_seed(0))
    assert bool(planned.call_count) is bool(calls.call_count) is not whole
    assert relative_error(found, model.sample(lr, 1, 0.2, torch.Generator().manual_seed(0), None)) < EXACT
    assert not model.sample(lr, 1, 0.2).requires_grad


def test_auto_is_whole_where_gradients_are_recorded(monkeypatch):
    monkeypatch.setattr("ncsr_fast.engine.memory.free_bytes", lambda device: 0)
    model = healthy()
    with mock.patch.object(Levels, "region_plan") as planned:
        model.sample(image(1, 3, 6, 6), 1, 0.2).sum().backward()
    assert not planned.called and model.levels[0].invconv.grad is not None


def meta_model(config: NCSRConfig, **options: str) -> NCSR:
    """A model whose tensors have no memory.

    Its caches are frozen, so that they store what they store of weights that have memory: values of all levels.
    """
    with torch.device("meta"):
        model = NCSR(config, **options).eval().requires_grad_(False)
    for level in model.levels:
        level.cache.freeze()
    return model


def meta_peak(config: NCSRConfig, height: int, width: int, n: int, tile: int | None, keeps: bool = False) -> tuple[int, NCSR]:
    """Most bytes of tensors while samples of an image are drawn, on the meta device, and the model that drew them."""
    model = meta_model(config)
    lr = torch.empty(1, model.flow.lr_channels, height, width, device="meta")
    if keeps:
        return peak_bytes(lambda: model.condition(lr, tile=tile).sample(n, tile=tile, on_nonfinite="ignore")), model
    return peak_bytes(lambda: model.sample(lr, n, tile=tile, on_nonfinite="ignore")), model


def few_steps(preset: str) -> NCSRConfig:
    """A preset of the same widths with few steps and blocks, which are evaluated one after the other."""
    full = NCSRConfig.preset(preset)
    steps = 2 if full.system == "ncsr" else full.steps
    return replace(
        full,
        steps=steps,
        noise_steps=tuple(min(steps, each) for each in full.noise_steps),
        blocks=4,
        stacked_blocks=(0, 1, 2, 3),
    )


EXACTLY, SLOWLY = NCSRConfig.preset, (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.parametrize(
    "config, preset, size, n, tile, keeps",
    [
        (EXACTLY, "ncsr-compact-x4", (48, 64), 6, None, False),  # evaluation of a level
        (EXACTLY, "ncsr-compact-x4", (48, 64), 1, None, True),  # plans of all levels
        (few_steps, "ncsr-x4", (32, 40), 1, None, False),  # planning of a level
        (few_steps, "ncsr-x4", (32, 40), 2, 16, False),
        (few_steps, "ncsr-x8", (8, 12), 1, None, False),  # folding of weights
        (few_steps, "srflow-da-x4", (16, 24), 12, None, False),  # deep networks
        (EXACTLY, "llflow-compact", (64, 64), 2, None, False),  # mixing of 192 channels
        *(
            pytest.param(EXACTLY, *cell, marks=SLOWLY)
            for cell in [
                ("ncsr-compact-x4", (96, 128), 2, 24, False),
                ("ncsr-compact-x4", (96, 128), 1, None, False),
                ("ncsr-x4", (32, 40), 4, None, False),
                ("ncsr-x4", (96, 80), 1, 32, False),
                ("ncsr-x8", (16, 24), 4, None, False),
                ("ncsr-x8", (64, 64), 2, 16, False),
                ("srflow-x4", (32, 40), 2, None, False),
                ("srflow-da-x4", (64, 64), 2, 16, False),
                ("fs-ncsr-x4", (32, 40), 2, None, False),
            ]
        ),
    ],
)
def test_the_estimate_of_memory(config, preset, size, n, tile, keeps):
    """Its terms are those of the engine: the peak is as high, to a few small tensors."""
    measured, model = meta_peak(config(preset), *size, n, tile, keeps)
    estimated = samples_memory(model, *size, n, tile, keeps)
    assert 0.97 < estimated.total / measured < 1.05
    assert estimated.tiled is (tile is not None)


@pytest.mark.parametrize("options", [dict(engine="plain"), dict(precision="bf16")])
def test_the_estimate_of_memory_under_other_options(options):
    model = meta_model(few_steps("ncsr-x4"), **options)
    lr = torch.empty(1, 3, 16, 24, device="meta")
    measured = peak_bytes(lambda: model.sample(lr, 3, tile=None, on_nonfinite="ignore"))
    assert 0.97 < samples_memory(model, 16, 24, 3, None).total / measured < 1.05


@pytest.mark.slow
@torch.no_grad()
def test_the_estimate_of_memory_is_that_of_the_device():
    """On a CPU kernels store less than PyTorch's operators: hidden layers are never in memory."""
    model = NCSR(NCSRConfig.preset("ncsr-compact-x4")).eval()
    measured = peak_bytes(lambda: model.sample(torch.rand(1, 3, 48, 64), 6, 0.0, tile=None))
    assert 0.95 < samples_memory(model, 48, 64, 6, None).total / measured < 1.1


@pytest.mark.parametrize(
    "preset, size, tiled",
    [
        ("ncsr-x4", (64, 48), False),
        ("ncsr-x4", (256, 192), True),
        ("ncsr-x8", (64, 48), False),
        ("ctflow", (64, 48), False),  # no features above LR size: the peak is in a block
        ("llflow-compact", (64, 64), False),
        ("llflow-lol", (64, 64), False),
    ],
)
@torch.no_grad()
def test_the_estimate_of_an_encoder(preset, size, tiled):
    """Most bytes while it makes a condition, and those of the condition; of five blocks the last is not stacked."""
    config = NCSRConfig.preset(preset) if preset.startswith("llflow") else replace(few_steps(preset), blocks=5)
    encoder = meta_model(config).encoder
    lr = torch.empty(1, encoder.in_channels, *size, device="meta").to(memory_format=torch.channels_last)
    made = []

    def call():
        made.append(encoder.condition_in_tiles(lr, ENGINE, 64) if tiled else encoder.condition(lr, ENGINE))

    measured, pixels = peak_bytes(call), size[0] * size[1]
    assert 0.95 < encoder.condition_bytes(4, tiled) * pixels / measured < 1.1
    (condition,) = made
    tensors = [tensor for each in condition.features for tensor in each if isinstance(tensor, Tensor)]
    tensors += [] if condition.prior_mean is None else [condition.prior_mean]
    stored = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    assert 0.99 < encoder.feature_bytes(4, tiled) * pixels / sum(stored.values()) < 1.01


def test_the_estimate_for_another_sample():
    """With it fewer samples are estimated, never as too few bytes."""
    model = meta_model(NCSRConfig.preset("ncsr-compact-x4"))
    many = samples_memory(model, 96, 128, 12, None)
    for n in (1, 3, 11):
        assert samples_memory(model, 96, 128, n, None).total <= many.total - (12 - n) * many.sample + 12
    one = samples_memory(model, 96, 128, 1, None)
    assert one.total + one.sample == samples_memory(model, 96, 128, 2, None).total


@torch.no_grad()
def test_the_plan_of_a_tile_is_freed_before_the_next_is_made():
    model, lr, made = healthy(), image(1, 3, 8, 8, seed=1), []

    def planned(*arguments, **options):
        assert all(plan() is None for plan in made)
        found = region(*arguments, **options)
        made.append(weakref.ref(found))
        return found

    region = Levels.region_plan
    with mock.patch.object(Levels, "region_plan", planned):
        hr = model.sample(lr, 1, 0.2, tile=4)[:, 0]
        drawn = len(made)
        model.encode(hr, lr, tile=4)
    assert len(made) > drawn > 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ncsr-x4", pytest.param("ncsr-x8", marks=pytest.mark.exhaustive)])
def test_150_bytes_an_hr_pixel(preset):
    """Of the widths of the published models; steps and blocks, which tiles have one after the other, are fewer."""
    full = NCSRConfig.preset(preset)
    stacked = tuple(range(1, 1 + len(full.stacked_blocks)))
    config = replace(
        full, steps=1, noise_steps=tuple(min(1, count) for count in full.noise_steps), blocks=6, stacked_blocks=stacked
    )
    small, large = ((128, 96), (256, 192))
    difference = meta_peak(config, *large, 1, 32)[0] - meta_peak(config, *small, 1, 32)[0]
    pixels = [height * width * config.scale**2 for height, width in (small, large)]
    assert difference / (pixels[1] - pixels[0]) <= 150
