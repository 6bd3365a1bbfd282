"""Published `.pklv4` files: read whole, and never run."""

from __future__ import annotations

import builtins
import os
import pickle

import numpy as np
import pytest
import torch

from ncsr_fast.data import ImageError, PickleRefused
from ncsr_fast.data.pickled import PickledImage, PickledImages

# what pickled arrays call, which NumPy 1 and 2 keep in different places
RECONSTRUCT, FROM_BUFFER = np.empty(0).__reduce_ex__(4)[0], np.empty(0).__reduce_ex__(5)[0]

IMAGES = [np.random.default_rng(n).integers(0, 256, (4 + n, 6, 3), dtype=np.uint8) for n in range(3)]


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def write(tmp_path, content, protocol=4):
    path = tmp_path / "images.pklv4"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_images_come_back(tmp_path, protocol):
    """Contiguous or not, in either order, and written by NumPy 1 (`numpy.core`) or 2 (`numpy._core`)."""
    arrays = [*IMAGES, np.asfortranarray(IMAGES[0]), IMAGES[1][::2, ::-1], IMAGES[2]]
    written = pickle.dumps(arrays, protocol)
    images = PickledImages(write(tmp_path, written))
    assert len(images) == 6 and images.sizes == [(4, 6), (5, 6), (6, 6), (4, 6), (3, 6), (6, 6)]
    assert all(torch.equal(image, torch.from_numpy(a.copy()).permute(2, 0, 1)) for image, a in zip(images, arrays))
    assert len({image.untyped_storage().data_ptr() for image in images}) == 1, "one tensor, to be shared by workers"
    assert str(PickledImage(images, 4)).endswith("images.pklv4[4]") and PickledImage(images, 4).size == (3, 6)
    if protocol == 3:  # names are plain lines there, without a length
        other = (b"numpy._core", b"numpy.core") if b"numpy._core" in written else (b"numpy.core", b"numpy._core")
        images = PickledImages(write(tmp_path, written.replace(*other)))
        assert torch.equal(images[2], torch.from_numpy(IMAGES[2]).permute(2, 0, 1))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "function, arguments",
    [(os.system, "touch {}"), (builtins.eval, "open('{}', 'w')"), (builtins.getattr, "x"), (np.fromfile, "{}")],
)
def test_other_names_are_refused_and_not_called(tmp_path, function, arguments, protocol):
    trace = tmp_path / "trace"
    path = write(tmp_path, [Call(function, arguments.format(trace))], protocol)
    # pickles name the module a function says it is from: posix, builtins (__builtin__ up to protocol 2), numpy
    with pytest.raises(PickleRefused, match=rf"images.pklv4' is refused: it asks for \w+\.{function.__name__}"):
        PickledImages(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "element",
    [
        Call(np.dtype, os.sep),
        Call(np.dtype, "u1", state={"code": "u1"}),
        Call(RECONSTRUCT, "anything", 10**15, "O"),
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (10**9, 10**9, 3), np.dtype("u1"), False, b"")),
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1, 1, 3), np.dtype("u1"), False, "abc")),
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1, 3.0, 1), np.dtype("u1"), False, b"abc")),
        Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (-1, -1, 3), np.dtype("u1"), False, b"abc")),
        Call(FROM_BUFFER, b"abc", "u1", (1, 1, 3), "C"),
        Call(FROM_BUFFER, b"", np.dtype("u1"), (0, 4, 3), "C"),
        np.array([[["a", 1, None]]], dtype=object),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        "a string",
    ],
)
def test_elements_that_are_no_image(tmp_path, element):
    with pytest.raises(ImageError, match=r"images.pklv4\[1\] must be a uint8 array of shape \(H, W, 3\), not "):
        PickledImages(write(tmp_path, [IMAGES[0], element]))


def test_arguments_that_fit_nothing(tmp_path):
    for element in (Call(np.dtype), Call(np.dtype, "u1", state=None), Call(FROM_BUFFER, 1)):
        with pytest.raises(ImageError, match=r"images.pklv4"):
            PickledImages(write(tmp_path, [element]))


@pytest.mark.parametrize("content", [{"images": 1}, (IMAGES[0],), [], 5])
def test_anything_but_a_list(tmp_path, content):
    with pytest.raises(
        ImageError, match=r"images.pklv4' must contain a list of images, not an? (empty )?(dict|tuple|list|int)"
    ):
        PickledImages(write(tmp_path, content))


def test_truncated_and_corrupt_files(tmp_path):
    whole = pickle.dumps(IMAGES, 4)
    for content in (whole[:-40], whole[:60], b"", b"no pickle", b"\x80\x04\x8c\x05ab"):
        with pytest.raises(ImageError, match=r"cannot read '.*images.pklv4': it is truncated or corrupt"):
            PickledImages(write(tmp_path, content))
    with pytest.raises(FileNotFoundError, match="absent.pklv4"):
        PickledImages(tmp_path / "absent.pklv4")
