"""`ncsr-fast gallery`: which images it shows, which originals are theirs, and what it refuses."""

from __future__ import annotations

import base64
import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast.cli.main import main
from ncsr_fast.data import degrade, read_image, write_image
from ncsr_fast.data.images import originals_of


def draw(path, height, width, mode="RGB", seed=0):
    """A picture with smooth parts in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(80, 180, (3, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    picture.save(path)
    return path


def gallery(model, *arguments):
    options = ["--n", "2", "--temperatures", "0", "--device", "cpu"]
    return main(["gallery", *options, *map(str, arguments), "--model", model])


def shown(page):
    """The names of the images of a page, and for each its pictures by their keys."""
    text = page.read_text(encoding="utf-8")
    names = re.findall("<h2 [^>]*><bdi>(.*?)</bdi>", text)
    sections = text.split("<article ")[1:]
    found = [
        dict(re.findall(r'value="([^"]*)" data-label=[^>]*><img[^>]* src="data:image/png;base64,([^"]*)"', s)) for s in sections
    ]
    return dict(zip(names, [{key: Image.open(io.BytesIO(base64.b64decode(data))) for key, data in s.items()} for s in found]))


@pytest.mark.slow
def test_samples_are_those_of_sample(settled, tmp_path, capsys):
    draw(tmp_path / "in" / "a.png", 7, 6)
    draw(tmp_path / "in" / "nested" / "b.png", 5, 8, seed=1)
    assert gallery(settled, tmp_path / "in", "--out", tmp_path / "new" / "page.html", "--seed", 3, "--tile", 4) == 0
    assert re.match(r"2 images × 2 samples → .*page.html \(0\.\d MB, 8 bits: round\)\n", capsys.readouterr().out)
    main(["sample", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--n", "2", "--seed", "3", "--model", settled])
    found = shown(tmp_path / "new" / "page.html")
    assert list(found) == ["a.png", "nested/b.png"]
    for name, pictures in found.items():
        assert list(pictures) == ["sample-0", "sample-1", "temperature-0", "lr", "bicubic", "deviation"]
        for number in range(2):
            written = Image.open(tmp_path / "out" / name.replace(".png", f"_sample0000{number}.png"))
            assert np.array_equal(pictures[f"sample-{number}"], written)
        assert np.array_equal(pictures["lr"], Image.open(tmp_path / "in" / name))


@pytest.mark.parametrize("lr_name", ["a", "ax4"])
def test_originals_by_their_names(settled, tmp_path, capsys, lr_name):
    """As pairs are named elsewhere; originals of no LR image are passed over."""
    for place in ("nested/a.png", "b.png"):
        draw(tmp_path / "hr" / place, 29, 26, seed=2)
    hr = read_image(tmp_path / "hr" / "nested" / "a.png")[:, :28, :24]
    write_image(tmp_path / "lr" / "nested" / f"{lr_name}.png", degrade(hr, 4))
    out = tmp_path / "page.html"
    assert gallery(settled, tmp_path / "lr", "--hr-images", tmp_path / "hr", "--out", out) == 0
    (pictures,) = shown(out).values()
    assert np.array_equal(pictures["original"], hr.permute(1, 2, 0))
    assert "without LPIPS: LPIPS needs the lpips package" in capsys.readouterr().err
    text = out.read_text()
    assert "without LPIPS: LPIPS needs the lpips package" in text and re.search(
        r"PSNR \d+\.\d\d dB · SSIM 0\.\d+ · LR-PSNR", text
    )


def test_the_same_name_comes_before_one_with_a_tag(tmp_path):
    for name in ("a", "ax4"):
        draw(tmp_path / f"{name}.png", 8, 8)
    assert originals_of(["ax4", "ax8"], tmp_path) == [tmp_path / "ax4.png", tmp_path / "a.png"]


def test_an_original_of_another_name(settled, tmp_path):
    hr, lr = draw(tmp_path / "large.png", 24, 24), draw(tmp_path / "small.png", 6, 6)
    assert gallery(settled, lr, "--hr-images", hr, "--out", tmp_path / "page.html") == 0
    assert "original" in shown(tmp_path / "page.html")["small.png"]


@pytest.mark.parametrize("place", ["hr", "hr/a.png"])
def test_originals_alone(settled, tmp_path, place):
    """LR images are made of them, at the size that evaluate gives them."""
    draw(tmp_path / "hr" / "a.png", 29, 37)
    assert gallery(settled, "--hr-images", tmp_path / place, "--out", tmp_path / "page.html", "--crop", 5) == 0
    (pictures,) = shown(tmp_path / "page.html").values()
    hr = read_image(tmp_path / "hr" / "a.png")[:, :24, :32]
    assert np.array_equal(pictures["lr"], degrade(hr, 4)[:, :5, 1:6].permute(1, 2, 0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P", "LA"])
def test_kinds_of_images(settled, tmp_path, mode):
    file = draw(tmp_path / "a.png", 6, 7, mode)
    assert gallery(settled, file, "--out", tmp_path / "page.html") == 0
    assert torch.equal(
        torch.from_numpy(np.array(shown(tmp_path / "page.html")["a.png"]["lr"])).permute(2, 0, 1), read_image(file)
    )


def test_names_of_any_kind(settled, tmp_path):
    names = [
        "<script>alert(1)</script>.png".replace("/", "∕"),
        "quo\"te's & ü 写真.png",
        "$shown $$.png",
        os.fsdecode(b"\xff.png"),
    ]
    for name in names:
        draw(tmp_path / "in" / name, 6, 5)
    assert gallery(settled, tmp_path / "in", "--out", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;∕script&gt;.png" in text and "<script>alert" not in text
    assert "quo&quot;te&#x27;s &amp; ü 写真.png" in text and "$shown $$.png" in text and "<bdi>?.png</bdi>" in text


def test_low_light(low_light_model, tmp_path, capsys):
    """No bicubic enlargement and no LR-PSNR, which compares with a reduction."""
    draw(tmp_path / "dark.png", 19, 23)
    arguments = ["gallery", str(tmp_path / "dark.png"), "--out", str(tmp_path / "page.html"), "--model", low_light_model]
    assert main([*arguments, "--temperatures", "0", "0.5", "--hr-images", str(draw(tmp_path / "bright.png", 19, 23))]) == 0
    assert capsys.readouterr().out.startswith("1 images × 1 samples")
    (pictures,) = shown(tmp_path / "page.html").values()
    assert list(pictures) == ["sample-0", "temperature-0", "temperature-0.5", "lr", "original"]
    assert {picture.size for picture in pictures.values()} == {(23, 19)}
    text = (tmp_path / "page.html").read_text()
    assert "23×19 pixels" in text and "SSIM" in text and "LR-PSNR" not in text and "no standard deviation" in text
    for name in "ab":
        draw(tmp_path / "more" / f"{name}.png", 9, 9)
    capsys.readouterr()
    assert main(["gallery", "--hr-images", str(tmp_path / "more"), *arguments[2:]]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("without LPIPS"))
    assert "reads dark photographs, which cannot be made of originals: give them" in line


def test_images_that_cannot_be_shown_are_left_out(settled, tmp_path, capsys):
    for name, (height, width) in {"a": (6, 5), "c": (6, 6)}.items():
        draw(tmp_path / "lr" / f"{name}.png", height, width)
    (tmp_path / "lr" / "b.png").write_text("broken")
    for name in "abc":
        draw(tmp_path / "hr" / f"{name}.png", 24, 20)
    assert gallery(settled, tmp_path / "lr", "--hr-images", tmp_path / "hr", "--out", tmp_path / "page.html") == 1
    out, err = capsys.readouterr()
    assert list(shown(tmp_path / "page.html")) == ["a.png"] and out.startswith("1 images × 2 samples")
    assert re.search("cannot read image .*b.png", err) and err.endswith("2 of 3 images were not shown\n")
    assert re.search(r"'.*lr/c.png' and '.*hr/c.png': the HR image is 24×20 and the LR image 6×6, which should be 6×5", err)


def test_several_images_too_large_for_a_page(settled, tmp_path, capsys):
    """Told before anything is computed."""
    for name in "ab":
        draw(tmp_path / "in" / f"{name}.png", 300, 310)
    draw(tmp_path / "in" / "c.png", 8, 8)
    assert gallery(settled, tmp_path / "in", "--out", tmp_path / "page.html") == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"ncsr-fast gallery: '.*a.png': its pictures would have 1.5 megapixels each, more than the 1.0 of a page: crop it to "
        r"its middle, of at most 256 LR pixels a side, by --crop 256 \(1 others as well\)\n",
        err,
    )
    assert not (tmp_path / "page.html").exists()


FAILURES = {
    "nothing": ([], "give LR images, or --hr-images to make them of"),
    "no-file": (["{in}/no.png"], "no file or folder '"),
    "no-original": (["{in}", "--hr-images", "{hr}"], "1 LR images have no original in '"),
    "no-originals": (["{in}", "--hr-images", "{in}/none"], "no folder '"),
    "one-original": (["{in}", "{hr}", "--hr-images", "{hr}/b.png"], "is a file, and there are 2 LR images; give the folder"),
    "sizes": (["{in}", "--hr-images", "{hr}/b.png"], "the HR image is 24×24 and the LR image 6×5"),
    "all-broken": (["{broken}"], "cannot read image"),
    "over-input": (["{in}/a.png", "--out", "{in}/a.png"], "would replace the input"),
    "folder-out": (["{in}", "--out", "{in}"], "--out: '"),
    "file-above-out": (["{in}", "--out", "{in}/a.png/page.html"], "a.png' is a file; give a folder"),
    "no-model": (["{in}", "--model", "nowhere"], "no model at 'nowhere'"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(settled, tmp_path, capsys, name):
    arguments, message = FAILURES[name]
    draw(tmp_path / "in" / "a.png", 6, 5)
    draw(tmp_path / "hr" / "b.png", 24, 24)
    (tmp_path / "broken.png").write_text("broken")
    before = sorted(tmp_path.rglob("*"))
    places = {"in": tmp_path / "in", "hr": tmp_path / "hr", "broken": tmp_path / "broken.png"}
    words = ["--out", str(tmp_path / "page.html"), "--model", settled, *(word.format(**places) for word in arguments)]
    assert main(["gallery", *words, "--n", "1"]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("without LPIPS")]
    assert len(err) == 1 and err[0].startswith("ncsr-fast gallery: ") and message in err[0], err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(settled, tmp_path, capsys):
    draw(tmp_path / "a.png", 6, 5)
    (tmp_path / "closed").mkdir(mode=0o500)
    assert gallery(settled, tmp_path / "a.png", "--out", tmp_path / "closed" / "page.html") == 1
    assert "cannot be written to; choose another place" in capsys.readouterr().err
