"""Reading every kind of image file, and refusing what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast.data import ImageError, crop_to_multiple, list_images, read_image, write_image
from ncsr_fast.data.images import image_size, pair_up

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize("suffix, options", [("png", {}), ("bmp", {}), ("webp", {"lossless": True})])
def test_lossless_formats(tmp_path, suffix, options):
    image = read_image(save(tmp_path / f"x.{suffix}", RGB, **options))
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(RGB.transpose(2, 0, 1).copy()))


def test_jpeg(tmp_path):
    flat = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    image = read_image(save(tmp_path / "x.jpg", flat, quality=95))
    assert (image.float() - torch.from_numpy(flat).permute(2, 0, 1)).abs().max() <= 3


def test_grey_alpha_and_palette_become_rgb(tmp_path):
    grey = torch.from_numpy(GREY).expand(3, 4, 6)
    assert torch.equal(read_image(save(tmp_path / "grey.png", GREY)), grey)
    assert torch.equal(read_image(save(tmp_path / "grey-alpha.png", GREY, "LA")), grey)
    alpha = np.dstack([RGB, np.arange(24, dtype=np.uint8).reshape(4, 6)])
    assert torch.equal(read_image(save(tmp_path / "alpha.png", alpha)), torch.from_numpy(RGB.transpose(2, 0, 1).copy()))
    two = np.where(GREY[..., None] > 100, [255, 0, 0], [0, 0, 255]).astype(np.uint8)
    for name, options in (("palette.png", {}), ("transparent.png", {"transparency": bytes([0, 255])})):
        path = tmp_path / name
        Image.fromarray(two).quantize(2).save(path, **options)
        assert torch.equal(read_image(path), torch.from_numpy(two.transpose(2, 0, 1).copy()))


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    deep = np.array([[0, 128, 129, 257], [32896, 65535, 65406, 65407]], dtype=np.uint16)
    image = read_image(save(tmp_path / "deep.png", deep))
    assert image[0].tolist() == [[0, 0, 1, 1], [128, 255, 254, 255]]
    assert torch.equal(image[0], image[2])


def test_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    path = save(tmp_path / "turned.png", RGB, exif=exif)
    assert read_image(path).shape == (3, 6, 4) and image_size(path) == (6, 4)


def test_write_and_read(tmp_path):
    image = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.7, 100.4 / 255]).expand(3, 1, 6)
    write_image(tmp_path / "new" / "x.png", image)
    assert read_image(tmp_path / "new" / "x.png")[0, 0].tolist() == [0, 0, 128, 255, 255, 100]


def test_unreadable_files(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    big = save(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(big[: len(big) // 2])
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "cut.jpg", "empty.png"):
        with pytest.raises(ImageError, match=f"cannot read image '.*{name}'"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


def test_listing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no image \(\.png"):
        list_images(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.PNG", "a.jpeg", "deep/er/c.webp"):
        save(tmp_path / name, RGB)
    (tmp_path / "notes.txt").touch()
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "deep/er/c.webp"]


def test_pairs(tmp_path):
    hr, lr = tmp_path / "hr", tmp_path / "lr"
    for folder, names in ((hr, ("0001.png", "sub/2.png")), (lr, ("0001x4.png", "sub/2.jpg"))):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save(folder / name, RGB)
    pairs = pair_up(list_images(hr), hr, list_images(lr), lr)
    assert [(a.name, b.name) for a, b in pairs] == [("0001.png", "0001x4.png"), ("2.png", "2.jpg")]
    (lr / "0001x4.png").unlink()
    with pytest.raises(ValueError, match="1 HR images have no LR partner in .*0001.png"):
        pair_up(list_images(hr), hr, list_images(lr), lr)


def test_crop_to_multiple():
    assert crop_to_multiple(torch.zeros(3, 17, 24), 8).shape == (3, 16, 24)
