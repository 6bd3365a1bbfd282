"""Tools of the latent space, each by what defines it."""

from __future__ import annotations

import pytest
import torch
from support import image, relative_error, tiny_model
from torch import Tensor
from variants import model_of

from ncsr_fast import NCSR, latents
from ncsr_fast.consistency import projected
from ncsr_fast.engine import tiles
from ncsr_fast.metrics import imresize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(model: NCSR, images: Tensor, lr: Tensor) -> NCSR:
    """The model with actnorms of images that are well inside [0, 1]: so are its samples, and none of them is clipped."""
    model.initialize(images, lr)
    return model.requires_grad_(False)


@pytest.fixture
def model() -> NCSR:
    return settled(tiny_model(), 0.45 + 0.1 * image(4, 3, 64, 64, seed=8), image(4, 3, 16, 16, seed=9))


def drawn(model: NCSR, lr: Tensor, temperature: float = 0.3, seed: int = 0) -> list[Tensor]:
    return [temperature * normal(len(lr), *shape, seed=seed + i) for i, shape in enumerate(model.latent_shapes(*lr.shape[2:]))]


def rms(z: Tensor) -> Tensor:
    return z.square().mean(dim=(1, 2, 3)).sqrt()


def test_interpolation_ends_in_what_it_is_between():
    first, second = ([normal(2, 6, 4, 5, seed=seed), normal(2, 8, 2, 2, seed=seed + 1)] for seed in (0, 5))
    for weight, expected in ((0, first), (1, second), (0.0, first), (1.0, second)):
        assert all(map(torch.equal, latents.interpolate(first, second, weight), expected))
    mixed = latents.interpolate(first, second, (0, 1))
    assert torch.equal(mixed[0], first[0]) and torch.equal(mixed[1], second[1])


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_interpolation_stays_on_the_sphere(weight):
    """Equal norms stay, by image; the angle is divided as the weight says; of the mean of two they would be smaller."""
    first, second = normal(3, 6, 8, 8), normal(3, 6, 8, 8, seed=1)
    second = second * (rms(first) / rms(second)).view(3, 1, 1, 1)
    (between,) = latents.interpolate([first], [second], weight)
    torch.testing.assert_close(rms(between), rms(first), rtol=1e-12, atol=0)

    def angle(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).arccos()

    torch.testing.assert_close(angle(first, between), weight * angle(first, second), rtol=1e-9, atol=0)
    torch.testing.assert_close(angle(first, between) + angle(between, second), angle(first, second), rtol=1e-9, atol=0)


def test_interpolation_of_latents_with_no_arc_between():
    """Equal ones, opposite ones, and zero (temperature 0)."""
    first = normal(1, 2, 3, 3)
    for second in (first, 2 * first, torch.zeros_like(first), first + 1e-12):
        (between,) = latents.interpolate([first], [second], 0.25)
        torch.testing.assert_close(between, 0.75 * first + 0.25 * second, rtol=0, atol=1e-8)
    assert latents.interpolate([first], [-first], 0.5)[0].isfinite().all()
    with pytest.raises(ValueError, match="weight must be one number, or 1, one of each latent, not 2"):
        latents.interpolate([first], [first], (0.1, 0.2))
    with pytest.raises(ValueError, match=r"the same shapes, not \[\(1, 2, 3, 3\)\] and \[\(2, 3, 3\)\]"):
        latents.interpolate([first], [first[0]], 0.1)


@pytest.mark.parametrize("temperature", [0.9, (0.5, 0.0)])
def test_normalized_latents_have_the_temperature(temperature):
    given = [3 * normal(2, 6, 8, 12), 0.01 * normal(2, 8, 2, 3, seed=1)]
    found = latents.normalize(given, temperature)
    wanted = (temperature, temperature) if isinstance(temperature, float) else temperature
    for z, before, value in zip(found, given, wanted):
        torch.testing.assert_close(rms(z), torch.full_like(rms(z), value), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(z / before, (z / before)[:, :1, :1, :1].expand_as(z), rtol=1e-9, atol=0)
    mean = normal(2, 8, 2, 3, seed=4)
    top = latents.normalize([given[0], given[1] + mean], temperature, prior_mean=mean)[1] - mean
    torch.testing.assert_close(rms(top), torch.full_like(rms(top), wanted[1]), rtol=1e-9, atol=1e-15)


def test_normalizing_in_windows_makes_all_parts_alike():
    """What is smooth beside what is not gets as much."""
    z = normal(1, 4, 12, 20)
    z[..., 10:] *= 0.1
    (whole,), (local,) = latents.normalize([z], 1.0), latents.normalize([z], 1.0, window=5)
    ratio = [float(rms(x[..., 13:]) / rms(x[..., :7])) for x in (z, whole, local)]
    assert ratio[0] == pytest.approx(ratio[1]) and ratio[1] < 0.15 and 0.8 < ratio[2] < 1.25
    assert torch.equal(latents.normalize([z], 1.0, window=1)[0].square().mean(dim=1).round(decimals=12), torch.ones(1, 12, 20))
    with pytest.raises(ValueError, match="window must be an odd number of latent pixels, not 4"):
        latents.normalize([z], 1.0, window=4)


@pytest.mark.parametrize("size", [(16, 24), (15, 23)])
def test_a_part_drawn_anew_leaves_the_rest(model, size):
    """Latents outside of the mask are the same bits, and pixels farther than the levels reach are the same numbers."""
    lr = image(1, 3, *size, seed=1)
    flow, given = model.condition(lr), drawn(model, lr)
    box = dict(top=0, left=0, height=3, width=4)
    before = latents.images_of(flow, given)
    found = latents.redraw(flow, given, latents.box_mask(lr, **box), 0.3, torch.Generator().manual_seed(1))
    scale = model.flow.scale
    cells = [int(scale / resolution) for resolution in model.flow.level_scales()]  # HR pixels to a pixel of a level
    reach = sum(cell * (tiles.halo(level) + 1) for cell, level in zip(cells, model.levels))
    changed = (found - before).abs().amax(dim=(0, 1))
    rows, columns = (changed.amax(dim=axis) > 1e-12 for axis in (1, 0))
    assert rows[: scale * 3].all() and columns[: scale * 4].all(), "in the mask it is another image"
    assert not columns[scale * 4 + reach :].any() and len(columns) > scale * 4 + reach
    masks = latents.latent_masks(flow, latents.box_mask(lr, **box))
    for z, new, mask in zip(given, latents.redrawn(given, masks, 0.3), masks):
        inside = mask.expand_as(z)
        assert torch.equal(new[~inside], z[~inside]) and (new[inside] != z[inside]).all() and 0 < mask.sum() < mask.numel()


def test_latents_drawn_anew_have_their_temperature(model):
    lr = image(1, 3, 64, 64, seed=1)
    given = [torch.full_like(z, 9.0) for z in drawn(model, lr)]
    flow = model.condition(lr)
    masks = latents.latent_masks(flow, latents.box_mask(lr, 0, 0, 64, 32))
    for new, mask in zip(latents.redrawn(given, masks, 0.7, torch.Generator().manual_seed(0)), masks):
        values = new[mask.expand_as(new)]
        assert abs(float(values.std()) - 0.7) < 4 * 0.7 / (2 * len(values)) ** 0.5  # four standard errors
        assert abs(float(values.mean())) < 4 * 0.7 / len(values) ** 0.5


def test_what_is_restored_has_latents_of_the_temperature(model):
    lr = image(2, 3, 4, 8, seed=1)
    flow = model.condition(lr)
    smooth = 0.499 + 0.002 * image(2, 3, 16, 32, seed=2)
    before, found = flow.encode(smooth).latents, latents.restore(flow, smooth, 0.5)
    assert 0 < found.min() and found.max() < 1, "nothing was clipped, so that the image has the latents that it was made of"
    for z, old in zip(flow.encode(found).latents, before):
        assert (rms(old) - 0.5).abs().min() > 0.01
        torch.testing.assert_close(rms(z), torch.full_like(rms(z), 0.5), rtol=1e-9, atol=0)


def test_what_is_transferred_has_latents_of_the_temperature_where_it_is(model):
    lr = image(1, 3, 6, 8, seed=1)
    flow = model.condition(lr)
    with torch.no_grad():
        original = latents.images_of(flow, drawn(model, lr, 0.5))
    assert 0 < original.min() and original.max() < 1
    pasted = latents.paste(original, image(1, 3, 8, 8, seed=3), 4, 12)
    assert torch.equal(pasted[..., 4:12, 12:20], image(1, 3, 8, 8, seed=3)) and torch.equal(
        pasted[..., 20:], original[..., 20:]
    )
    mask = latents.box_mask(lr, 1, 3, 2, 2)
    before, masks = flow.encode(pasted).latents, latents.latent_masks(flow, mask)
    normalized = latents.normalize(before, 0.5, masks)
    for z, old, inside in zip(normalized, before, masks):
        inside = inside.expand_as(z)
        assert float(z[inside].square().mean().sqrt()) == pytest.approx(0.5, rel=1e-9)
        assert torch.equal(z[~inside], old[~inside])
    found = latents.transfer(flow, pasted, mask, 0.5)
    assert torch.equal(found, latents.images_of(flow, normalized))
    own = model.condition(imresize(original, 1 / 4))
    pasted = latents.paste(original, original[..., 8:16, 8:16], 4, 12)
    expected = latents.transfer(own, projected(pasted, own.lr, 4), mask, 0.1)
    assert torch.equal(latents.transfer(own, pasted, mask, 0.1, project=True), expected)
    assert not torch.equal(latents.transfer(own, pasted, mask, 0.1), expected)
    assert relative_error(latents.transfer(flow, original, torch.zeros_like(mask), 0.5), original) < 1e-9, "nothing to change"


def test_a_flow_of_residuals_with_a_prior():
    model, lr, hr = model_of().requires_grad_(False), image(1, 3, 4, 6, seed=2), 0.1 + 0.8 * image(1, 3, 8, 12, seed=3)
    flow = model.condition(lr)
    encoded = flow.encode(flow.residual(hr))
    assert relative_error(latents.images_of(flow, encoded.latents), hr) < 1e-9
    top = latents.redrawn(
        encoded.latents, latents.latent_masks(flow, latents.box_mask(lr, 0, 0, 4, 6)), 0.0, prior_mean=flow.prior_mean
    )
    assert torch.equal(top[-1], flow.prior_mean.expand_as(top[-1])) and not top[0].any()


@pytest.mark.parametrize("box", [(0, 0, 0, 1), (-1, 0, 2, 2), (3, 0, 2, 1), (0, 4, 1, 3)])
def test_what_masks_may_not_be(model, box):
    lr = image(1, 3, 4, 6)
    with pytest.raises(ValueError, match="must lie in the LR image, 6×4"):
        latents.box_mask(lr, *box)
    with pytest.raises(ValueError, match=r"mask must have shape \(1 or 1, 1, 4, 6\), that of lr, not \(1, 1, 6, 4\)"):
        latents.transfer(model.condition(lr), image(1, 3, 16, 24), torch.ones(1, 1, 6, 4))
    with pytest.raises(ValueError, match="what is pasted, 3×2 pixels at row 3 and column 0, must lie in the image, 6×4"):
        latents.paste(lr, lr[..., :2, :3], 3, 0)
