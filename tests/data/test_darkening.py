"""Photographs made dark: what becomes of a pixel, and folders that are pairs."""

from __future__ import annotations

import pytest
import torch
from support import contents

from ncsr_fast.data import RandomCrops, read_image, to_float
from ncsr_fast.data.darkening import GAIN, GAMMA, NOISE, darken, darken_folder, main


def test_darken_is_gain_times_the_power_of_a_pixel():
    image = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    dark = darken(image, gamma=2.0, gain=0.5, noise=0.0)
    assert dark.dtype == torch.uint8 and torch.equal(dark, (127.5 * to_float(image).square()).round().byte())


def test_noise_is_gaussian_of_its_deviation():
    generator = torch.Generator().manual_seed(0)
    image = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    noise = to_float(darken(image, 2.0, 0.5, 0.05, generator)) - 0.5
    assert noise.std() == pytest.approx(0.05, rel=0.03) and abs(noise.mean()) < 2e-3
    again = to_float(darken(image, 2.0, 0.5, 0.05, generator.manual_seed(0))) - 0.5
    assert torch.equal(noise, again)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"gamma": 0.0}, "gamma must be positive, not 0.0"),
        ({"gain": -1.0}, "gain must be 0 or more, not -1.0"),
        ({"noise": -0.1}, "noise must be 0 or more, not -0.1"),
    ],
)
def test_arguments(change, said):
    with pytest.raises(ValueError, match=said):
        darken(torch.zeros(3, 2, 2, dtype=torch.uint8), **{"gamma": 2.0, "gain": 0.5, "noise": 0.0, **change})


def test_a_folder_is_one_of_a_pair(photos, tmp_path, capsys):
    written = darken_folder(photos, tmp_path / "dark", seed=3)
    assert [str(path.relative_to(tmp_path / "dark")) for path in written] == ["a.png", "b.png", "nested/c.png"]
    pairs = RandomCrops(photos, tmp_path / "dark", scale=1, crop=32, equalize=True)
    assert len(pairs) == 3 and pairs[0]["lr"].float().mean() < 0.6 * pairs[0]["hr"].float().mean()
    images = [(read_image(photos / path.relative_to(tmp_path / "dark")), read_image(path)) for path in written]
    for bright, dark in images:
        limit = GAIN[1] * to_float(bright).pow(GAMMA[0]) + 6 * NOISE[1] + 1 / 255
        assert (to_float(dark) <= limit).all()
    main([str(photos), str(tmp_path / "again"), "--seed", "3"])
    assert capsys.readouterr().out == f"3 images in {tmp_path / 'again'}\n"
    assert contents(tmp_path / "again") == contents(tmp_path / "dark")
    darken_folder(photos, tmp_path / "others", seed=4)
    assert contents(tmp_path / "others") != contents(tmp_path / "dark")


def test_the_command_says_what_is_wrong_in_a_line(photos, tmp_path, capsys):
    for images, out, said in [(photos, photos / "dark", "out: "), (tmp_path / "none", tmp_path / "out", "")]:
        with pytest.raises(SystemExit) as ended:
            main([str(images), str(out)])
        err = capsys.readouterr().err
        assert ended.value.code == 1 and err.startswith(f"python -m ncsr_fast.data.darkening: {said}") and err.count("\n") == 1


def test_dark_photographs_are_not_put_among_the_bright(photos):
    with pytest.raises(ValueError, match="out: .*dark' is in the folder of the photographs"):
        darken_folder(photos, photos / "dark")
