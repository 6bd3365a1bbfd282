"""Reading every kind of image file, and refusing what is none."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast.data import ImageError, crop_to_multiple, list_images, read_image, write_image
from ncsr_fast.data.images import SUFFIXES, image_size, pair_up

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
FORMAT_OF = {".jpf": "JPEG2000", ".dib": "DIB"}
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


@pytest.mark.parametrize("mode", ["1", "P", "PA", "CMYK", "YCbCr", "RGBA", "LA"])
def test_other_kinds_of_pixels(tmp_path, mode):
    image = Image.fromarray(RGB).convert("P").convert(mode) if mode == "PA" else Image.fromarray(RGB).convert(mode)
    # Pillow before 13 reads no YCbCr that is not compressed
    image.save(tmp_path / "x.tif", compression="tiff_lzw" if mode == "YCbCr" else None)
    expected = np.array(image.convert("RGBA").convert("RGB") if mode == "PA" else image.convert("RGB"))
    assert (read_image(tmp_path / "x.tif").permute(1, 2, 0).int() - torch.from_numpy(expected)).abs().max() <= (
        3 if mode == "YCbCr" else 0
    )


@pytest.mark.parametrize(
    "dtype, pixels, said",
    [
        (np.float32, [0, 1], "floats"),
        (np.int32, [-5, 3], "32-bit integers"),
        (np.int32, [5, 70000], "32-bit integers"),
        (np.int32, [0, 255], "32-bit integers"),
        (np.int32, [0, 65535], "32-bit integers"),
    ],
)
def test_pixels_that_are_no_colours(tmp_path, dtype, pixels, said):
    with pytest.raises(ImageError, match=f"x.tif': its pixels are {said} of unknown range; save it with 8 bits, or"):
        read_image(save(tmp_path / "x.tif", np.array([pixels], dtype=dtype)))


def tiff(path, bits, data, sample_format=1, order="<"):
    """A TIFF of 2×2 grey pixels."""
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 2),
            (279, 4, len(data)), (339, 3, sample_format)]  # fmt: skip
    entries = [struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}I" if kind == 4 else f"{order}Hxx", value)
               for tag, kind, value in tags]  # fmt: skip
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_twelve_and_sixteen_bits(tmp_path, order):
    sixteen = tiff(tmp_path / "16.tif", 16, struct.pack(f"{order}4H", 0, 257, 32896, 65535), order=order)
    assert read_image(sixteen)[0].flatten().tolist() == [0, 1, 128, 255]
    signed = tiff(tmp_path / "signed.tif", 16, struct.pack(f"{order}4h", 0, 257, 3289, 32767), 2, order)
    with pytest.raises(ImageError, match="its pixels are signed 16-bit integers of unknown range"):
        read_image(signed)
    if order == "<":  # Pillow reads no other, and keeps the values: 0, 16, 2048, 4095, two in three bytes
        twelve = tiff(tmp_path / "12.tif", 12, bytes.fromhex("000010800fff"))
        assert read_image(twelve)[0].flatten().tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("highest", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_netpbm_of_any_depth(tmp_path, kind, highest):
    values = (GREY.astype(np.float64) / 255 * highest).round().astype(">u2" if highest > 255 else "u1")
    data = values if kind == "P5" else np.repeat(values[..., None], 3, axis=2)
    (tmp_path / "x.pnm").write_bytes(b"%s 6 4 %d\n" % (kind.encode(), highest) + data.tobytes())
    assert torch.equal(read_image(tmp_path / "x.pnm"), torch.from_numpy(GREY).expand(3, 4, 6))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_several_pictures_in_a_file(tmp_path, suffix):
    frames = [Image.fromarray(RGB + 9 * number) for number in range(3)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="it contains 3 pictures; save the one"):
        read_image(tmp_path / f"x.{suffix}")


def test_smaller_copies_in_a_file_are_no_pictures_of_their_own(tmp_path):
    """A phone's MPO, and the overviews of a satellite's TIFF."""
    frames, expected = [Image.fromarray(RGB), Image.fromarray(RGB[::2, ::2])], torch.from_numpy(RGB.transpose(2, 0, 1).copy())
    frames[1].encoderinfo = {"tiffinfo": {254: 1}}
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    assert torch.equal(read_image(tmp_path / "x.tif"), expected)
    frames[0].save(tmp_path / "x.mpo", save_all=True, append_images=frames[1:], quality=95)
    assert read_image(tmp_path / "x.mpo").shape == (3, 4, 6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned.{suffix}", RGB, exif=exif)
    size = (6, 4) if orientation == 6 else (4, 6)
    assert tuple(read_image(path).shape[1:]) == image_size(path) == size


def test_orientation_in_xmp(tmp_path):
    path = save(tmp_path / "x.jpg", RGB, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>')
    assert tuple(read_image(path).shape[1:]) == image_size(path) == (6, 4)


def test_an_image_of_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="x.png': .*exceeds limit of 20 pixels.*; cut it into parts, or raise PIL"):
            read(save(tmp_path / "x.png", RGB))


@pytest.mark.parametrize("trouble", ["bomb", "memory"])
def test_a_large_png_that_is_broken_off_is_named_as_that(tmp_path, monkeypatch, trouble):
    path = save(tmp_path / "x.png", RGB)
    whole = path.read_bytes()
    for content, said in ((whole, "exceeds limit|^$"), (whole[:50], "x.png': it is truncated, .*copy or download it again")):
        path.write_bytes(content)
        with monkeypatch.context() as patch:
            if trouble == "bomb":
                patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
            else:
                patch.setattr("PIL.ImageFile.ImageFile.load", no_memory)
            with pytest.raises(MemoryError if trouble == "memory" and content is whole else ImageError, match=said):
                read_image(path)


def no_memory(image):
    raise MemoryError


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_image_errors(tmp_path):
    """Whatever a decoder makes of them."""
    random = np.random.default_rng(0)
    for suffix in (suffix for suffix in SUFFIXES if suffix not in (".avif", ".apng")):
        path = save(tmp_path / f"x{suffix}", random.integers(0, 255, (9, 12, 3), dtype=np.uint8), format=FORMAT_OF.get(suffix))
        whole = bytearray(path.read_bytes())
        for _ in range(40):
            damaged = whole.copy()
            for place in random.integers(0, len(whole), 4):
                damaged[place] = random.integers(0, 256)
            path.write_bytes(damaged[: random.integers(1, len(damaged) + 1)])
            for read in (read_image, image_size):
                with contextlib.suppress(ImageError, MemoryError):
                    read(path)


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


def test_pairs(tmp_path):
    hr, lr = tmp_path / "hr", tmp_path / "lr"
    for folder, names in ((hr, ("0001.png", "sub/2.png")), (lr, ("0001x4.png", "sub/2.jpg", "3.png"))):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save(folder / name, RGB)
    with pytest.warns(UserWarning, match="1 LR images have no HR partner in '.*hr': '.*3.png'"):
        pairs = pair_up(list_images(hr), hr, list_images(lr), lr)
    assert [(a.name, b.name) for a, b in pairs] == [("0001.png", "0001x4.png"), ("2.png", "2.jpg")]
    (lr / "0001x4.png").unlink()
    with pytest.raises(ValueError, match="1 HR images have no LR partner in .*0001.png"):
        pair_up(list_images(hr), hr, list_images(lr), lr)


def test_pairs_of_normal_and_low_light(tmp_path):
    """The names of LOL-v2's real images, which begin with what they are."""
    pixels, folders = np.zeros((4, 4, 3), np.uint8), [tmp_path / "Normal", tmp_path / "Low"]
    for folder, prefix in zip(folders, ("normal", "low")):
        (folder / "sub").mkdir(parents=True)
        for name in (f"{prefix}00001.png", f"sub/{prefix}2.png", "3.png"):
            Image.fromarray(pixels).save(folder / name)
    files = [list_images(folder) for folder in folders]
    names = [tuple(path.name for path in pair) for pair in pair_up(files[0], folders[0], files[1], folders[1])]
    assert sorted(names) == [("3.png", "3.png"), ("normal00001.png", "low00001.png"), ("normal2.png", "low2.png")]


@pytest.mark.parametrize(
    "name, message",
    [
        ("hr/1.jpg", "'.*hr/1.jpg' and '.*hr/1.png' would both be the image '1' of a pair"),
        ("lr/1.jpg", "'.*lr/1.jpg' and '.*lr/1.png' would both be the image '1' of a pair"),
        ("lr/1x4.png", "'.*lr/1.png' and '.*lr/1x4.png' would both be the LR image of '.*hr/1.png'"),
    ],
)
def test_pairs_of_which_two_files_are_one(tmp_path, name, message):
    for path in ("hr/1.png", "lr/1.png", name):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        save(tmp_path / path, RGB)
    hr, lr = tmp_path / "hr", tmp_path / "lr"
    with pytest.raises(ValueError, match=message):
        pair_up(list_images(hr), hr, list_images(lr), lr)


def test_crop_to_multiple():
    assert crop_to_multiple(torch.zeros(3, 17, 24), 8).shape == (3, 16, 24)
