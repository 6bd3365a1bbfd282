"""imresize against the recorded outputs of the published programs' MATLAB-style resize, and its own contract."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from support import image, vector_file

from ncsr_fast.metrics import imresize

module = importlib.import_module("ncsr_fast.metrics.imresize")  # its function hides it

SCALES = {"down2": 1 / 2, "down4": 1 / 4, "down8": 1 / 8, "up4": 4}


@pytest.fixture(scope="module")
def vectors():
    with np.load(vector_file("imresize.npz")) as arrays:
        return {name: torch.from_numpy(arrays[name]).permute(2, 0, 1) for name in arrays.files}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_vectors(vectors, kind, number):
    scale = SCALES[kind]
    source, expected = vectors[f"float_{number}"], vectors[f"float_{number}_{kind}"]
    assert (imresize(source, scale) - expected).abs().max() < 1e-14 * 256
    assert (imresize(source.float(), scale) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.equal(imresize(vectors[f"u8_{number}"], scale), vectors[f"u8_{number}_{kind}"])


@pytest.mark.parametrize("scale", [1 / 8, 1 / 4, 1 / 3, 1 / 2, 1, 3, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 300), (299, 40), (513, 514)])
def test_bands_of_8_bit_images_are_the_whole(scale, height, width, monkeypatch):
    """A matrix is multiplied without the columns that are zero in a band of its rows; at the borders mirrored ones are not."""
    x = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = imresize(x, scale)
    monkeypatch.setattr(module, "_BAND", 10**9)
    assert torch.equal(imresize(x, scale), found)


def test_bands_leave_out_zeros_alone():
    for scale in (1 / 8, 1 / 3, 1, 4):
        matrix = module.resizing_matrix(517, scale)
        kept = torch.zeros_like(matrix)
        for top, (part, taps) in enumerate(module._bands(matrix, 517, scale)):
            kept[top * module._BAND :][: len(part), taps] = part
        assert torch.equal(kept, matrix)


def test_batches_are_images_one_by_one():
    batch = image(2, 5, 3, 12, 20)
    whole = imresize(batch, 1 / 4)
    assert whole.shape == (2, 5, 3, 3, 5)
    assert torch.allclose(whole[1, 4], imresize(batch[1, 4], 1 / 4), rtol=1e-14)


def test_constant_images_stay_constant():
    for scale in (1 / 8, 1 / 3, 1, 2.5):
        assert torch.allclose(imresize(torch.full((7, 9), 0.25, dtype=torch.float64), scale), torch.tensor(0.25).double())


def test_gradient():
    assert torch.autograd.gradcheck(lambda x: imresize(x, 1 / 2), image(1, 4, 6).requires_grad_())


def test_a_matrix_first_used_under_inference_mode_can_be_used_under_autograd():
    with torch.inference_mode():
        imresize(image(1, 34, 38), 1 / 2)
    imresize(image(1, 34, 38).requires_grad_(), 1 / 2).sum().backward()


@pytest.mark.parametrize(
    "x, scale, error, message",
    [
        (torch.zeros(3, 4), 0, ValueError, "scale must be positive"),
        (torch.zeros(4), 2, ValueError, r"x must have shape \(…, H, W\)"),
        (torch.zeros(3, 0), 2, ValueError, "x must have shape"),
        (torch.zeros(3, 4, dtype=torch.int32), 2, TypeError, "x must be floating point or uint8, not torch.int32"),
    ],
)
def test_bad_calls(x, scale, error, message):
    with pytest.raises(error, match=message):
        imresize(x, scale)
