"""LLFlow's input, padding, 8 bits and brightness: bit for bit what the published programs make (tests/conformance/family)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support import image, vector_file
from torch import Tensor

from ncsr_fast.data import (
    RandomCrops,
    crop_loader,
    crop_margins,
    equalize,
    list_images,
    low_light_input,
    match_brightness,
    pad_mirrored,
    pad_to_even,
    read_image,
    to_float,
    to_pair,
    to_uint8,
)

NUMBERS = pytest.mark.parametrize("number", range(3))


def vector(key: str) -> Tensor:
    """Images with the channels first."""
    with np.load(vector_file("family/llflow_preprocessing.npz")) as arrays:
        array = torch.from_numpy(arrays[key])
    return array.permute(2, 0, 1) if array.dim() == 3 else array


@NUMBERS
def test_published_input(number):
    low = vector(f"image_{number}")
    equalized = equalize(low)
    assert torch.equal(equalized, vector(f"equalised_{number}"))
    for found in (low_light_input(low[None]), low_light_input(low, equalized)[None]):
        assert found.dtype == torch.float32 and torch.equal(found, vector(f"input_{number}"))


@NUMBERS
def test_published_padding(number):
    low = vector(f"image_{number}")
    padded, margins = pad_mirrored(low)
    assert list(margins) == vector(f"margins_{number}").tolist()
    assert torch.equal(padded, vector(f"padded_{number}"))
    assert torch.equal(crop_margins(padded, margins), low)
    even, margins = pad_to_even(low)
    assert torch.equal(even, vector(f"even_{number}"))
    assert torch.equal(crop_margins(even, margins), low)


@NUMBERS
def test_published_8_bits(number):
    """Truncated, not rounded."""
    decoded, expected = vector(f"float_{number}")[0], vector(f"eight_bit_{number}")
    assert torch.equal(to_uint8(decoded, "truncate"), expected)
    assert not torch.equal(to_uint8(decoded), expected)
    with pytest.raises(ValueError, match="to_8bit must be one of 'round', 'truncate', not 'floor'"):
        to_uint8(decoded, "floor")


def opencv_equalized(channel: np.ndarray) -> np.ndarray:
    """One channel, value by value."""
    table, seen = {}, 0
    darkest = channel.min()
    rest = np.float32(channel.size - (channel == darkest).sum())
    for value in range(256):
        seen += int((channel == value).sum()) if value > darkest else 0
        table[value] = int(np.rint(np.float32(seen) * (np.float32(255) / rest))) if rest else value
    return np.vectorize(table.get)(channel).astype(np.uint8)


@pytest.mark.parametrize("values", [(0, 256), (10, 14), (250, 256), (7, 8), (0, 2)])
def test_histograms_of_each_channel_and_image(values):
    """Of channels of one value, and of batches."""
    pixels = np.random.default_rng(0).integers(*values, (2, 3, 5, 9)).astype(np.uint8)
    pixels[0, 1] = 77
    expected = np.stack([np.stack([opencv_equalized(channel) for channel in rgb]) for rgb in pixels])
    assert (equalize(torch.from_numpy(pixels)).numpy() == expected).all()
    assert equalize(torch.empty(3, 0, 4, dtype=torch.uint8)).shape == (3, 0, 4)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 9])
def test_images_smaller_than_their_padding(side):
    pixels = (255 * image(1, 3, side, 8)).to(torch.uint8)
    for multiple in (8, 16):
        padded, margins = pad_mirrored(pixels, multiple)
        expected = np.pad(pixels.numpy(), ((0, 0), (0, 0), margins[:2], margins[2:]), mode="symmetric")
        assert (padded.numpy() == expected).all() and padded.shape[2] % multiple == padded.shape[3] % multiple == 0
    even, margins = pad_to_even(pixels)
    expected = np.pad(pixels.numpy(), ((0, 0), (0, 0), margins[:2], margins[2:]), mode="reflect")
    assert (even.numpy() == expected).all() and even.shape[2] == side + side % 2


def test_brightness_of_the_reference():
    """By the program's weights, whose order is not that of RGB; nothing is clipped."""
    decoded, reference = 1.6 * image(2, 3, 6, 4) - 0.3, image(2, 3, 6, 4, seed=1)
    matched = match_brightness(decoded, reference)
    grey = 0.114 * reference[:, 0] + 0.587 * reference[:, 1] + 0.299 * reference[:, 2]
    for index in range(2):
        assert matched[index].mean().item() == pytest.approx(grey[index].mean().item(), rel=1e-13)
        ratio = matched[index] / decoded[index]
        assert (ratio.max() - ratio.min()).abs() < 1e-12
        assert torch.equal(match_brightness(decoded[index], reference[index]), matched[index])
    assert matched.min() < 0
    with pytest.raises(ValueError, match=r"the same shape \(…, 3, H, W\), not \(2, 3, 6, 4\) and \(3, 6, 4\)"):
        match_brightness(decoded, reference[0])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: low_light_input(torch.rand(3, 4, 4)), TypeError, "low must be a tensor of uint8, .* not torch.float32"),
        (lambda: equalize("dark.png"), TypeError, "image must be a tensor of uint8, .* not str"),
        (lambda: equalize(torch.zeros(4, 4, dtype=torch.uint8)), ValueError, r"image must have shape \(…, C, H, W\)"),
        (lambda: low_light_input(torch.zeros(1, 4, 4, dtype=torch.uint8)), ValueError, r"low must have shape \(…, 3, H, W\)"),
        (
            lambda: low_light_input(*(torch.zeros(3, side, 4, dtype=torch.uint8) for side in (4, 5))),
            ValueError,
            r"equalized must have the shape of low, \(3, 4, 4\), not \(3, 5, 4\)",
        ),
        (lambda: pad_mirrored(torch.zeros(3, 4, 4), 0), ValueError, "multiple must be at least 1, not 0"),
    ],
)
def test_bad_images(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def pairs(photos, tmp_path):
    """Folders of photographs and of the same in the dark."""
    for path in list_images(photos):
        dark = tmp_path / "low" / path.relative_to(photos)
        dark.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((read_image(path) // 5).permute(1, 2, 0).numpy()).save(dark)
    return photos, tmp_path / "low"


def test_crops_of_pairs(pairs):
    """HR and LR crops are of one place, and the histogram is that of the whole image."""
    normal, low = pairs
    crops = RandomCrops(normal, low, scale=1, crop=32, equalize=True)
    paths = {str(path): (path, low / path.relative_to(normal)) for path in list_images(normal)}
    for number in range(4):
        item = crops[number]
        assert torch.equal(item["lr"], item["hr"] // 5)
        hr, dark = map(read_image, paths[crops.name(number)])
        places = (hr.unfold(1, 32, 1).unfold(2, 32, 1) == item["hr"][:, None, None]).flatten(3).all(3).all(0).nonzero()
        windows = [equalize(dark)[:, y : y + 32, x : x + 32] for y, x in places.tolist()]
        assert any(torch.equal(item["equalized"], window) for window in windows)
        assert not torch.equal(item["equalized"], equalize(item["lr"]))
    plain = RandomCrops(normal, low, scale=1, crop=32)
    assert all(torch.equal(plain[n][key], crops[n][key]) for n in range(4) for key in ("hr", "lr"))


def test_batches_of_pairs(pairs):
    crops = RandomCrops(*pairs, scale=1, crop=32, equalize=True)
    batch = next(iter(crop_loader(crops, batch=2, first_step=0, stop_step=1)))
    hr, lr = to_pair(batch, 1, "cpu")
    assert torch.equal(hr, to_float(batch["hr"]))
    assert torch.equal(lr, low_light_input(batch["lr"], batch["equalized"]))
    assert lr.shape == (2, 6, 32, 32)


def test_no_histogram_of_what_is_made_of_a_crop(photos):
    with pytest.raises(ValueError, match="equalize needs lr_images"):
        RandomCrops(photos, scale=1, crop=32, equalize=True)
