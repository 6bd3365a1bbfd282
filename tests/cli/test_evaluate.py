"""`ncsr-fast evaluate`: scores of folders, and of pairs that do not fit."""

from __future__ import annotations

import json
import re
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from ncsr_fast import NCSR
from ncsr_fast.cli.main import main
from ncsr_fast.data import crop_margins, list_images, match_brightness, read_image, write_image
from ncsr_fast.metrics import imresize, psnr
from ncsr_fast.photographs import photograph_input
from ncsr_fast.warn import warn_caller


def test_evaluate(model, photos, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    arguments = ["evaluate", str(photos), "--model", model, "--n", "2", "--limit", "2", "--json", str(scores)]
    assert main([*arguments, "--temperatures", "0", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "LR-PSNR" in out and "without LPIPS: LPIPS needs the lpips package" in err
    result = json.loads(scores.read_text())
    assert result["files"] == ["a.png", "b.png"]
    by_method = {row["method"]: row for row in result["scores"]}
    assert list(by_method) == ["bicubic", "temperature 0", "temperature 0.5"]
    for row in by_method.values():
        assert len(row["images"]["psnr"]) == 2 and row["means"]["psnr"] == pytest.approx(sum(row["images"]["psnr"]) / 2)
        assert row["means"]["lr_psnr_worst"] <= row["means"]["lr_psnr"]
    assert by_method["temperature 0"]["means"]["diversity"] == 0 < by_method["temperature 0.5"]["means"]["diversity"]
    assert by_method["bicubic"]["means"]["psnr"] > 30, "smooth pictures"


def test_evaluate_with_given_lr_images_is_evaluate_with_the_same_lr(model, photos, tmp_path):
    from ncsr_fast.data import degrade

    for path in list_images(photos):
        write_image(tmp_path / "lr" / path.relative_to(photos), degrade(read_image(path), 4))
    results = []
    for extra in ([], ["--lr-images", str(tmp_path / "lr")]):
        scores = tmp_path / f"{len(extra)}.json"
        assert main(["evaluate", str(photos), "--model", model, "--temperatures", "0", "--json", str(scores), *extra]) == 0
        results.append(
            [{k: v for k, v in row["images"].items() if k != "seconds"} for row in json.loads(scores.read_text())["scores"]]
        )
    assert results[0] == results[1]


def pair(folder, hr, lr, name="comic.png"):
    for kind, (height, width) in (("hr", hr), ("lr", lr)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[:height, :width]
        Image.fromarray(np.stack([100 + x, 100 + y, 100 + x + y], axis=2).clip(0, 255).astype(np.uint8)).save(
            folder / kind / name
        )


def evaluate(model, folder, *arguments):
    command = ["evaluate", folder / "hr", "--lr-images", folder / "lr", "--model", model, "--temperatures", "0", *arguments]
    return main([str(word) for word in command])


@pytest.mark.parametrize("hr, lr", [((67, 66), (16, 16)), ((78, 77), (19, 19)), ((78, 77), (18, 18)), ((52, 36), (13, 9))])
def test_hr_images_of_any_size(model, tmp_path, hr, lr):
    """The LR image says of which crop it is: the largest with multiples of the scale, or of 8."""
    pair(tmp_path, hr, lr)
    assert evaluate(model, tmp_path, "--json", tmp_path / "scores.json") == 0
    expected = read_image(tmp_path / "hr" / "comic.png")[:, : 4 * lr[0], : 4 * lr[1]]
    small = read_image(tmp_path / "lr" / "comic.png")
    found = json.loads((tmp_path / "scores.json").read_text())["scores"][0]["means"]["psnr"]
    assert found == pytest.approx(float(psnr(imresize(small, 4)[None], expected[None])))


def test_pairs_that_do_not_fit_are_named_and_passed_over(model, tmp_path, capsys):
    pair(tmp_path, (64, 64), (15, 16), "wrong.png")
    assert evaluate(model, tmp_path) == 1
    said = (
        r"evaluate: '.*hr/wrong.png' and '.*lr/wrong.png': the HR image is 64×64 and the LR image 15×16, which should be 16×16 "
        "at scale 4\n$"
    )
    assert re.search(said, capsys.readouterr().err)
    pair(tmp_path, (64, 64), (16, 16), "right.png")
    pair(tmp_path, (7, 64), (1, 16), "small.png")
    (tmp_path / "hr" / "broken.png").write_text("no image")
    (tmp_path / "lr" / "broken.png").write_text("no image")
    assert evaluate(model, tmp_path, "--json", tmp_path / "scores.json") == 1
    err = capsys.readouterr().err
    assert "small.png': the HR image is 7×64, less than 8×8, too small" in err and "cannot read image '" in err
    assert err.endswith("evaluate: 3 of 4 images were not measured\n")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["files"] == ["right.png"] and all(len(row["images"]["psnr"]) == 1 for row in scores["scores"])


def test_an_image_too_large_to_be_measured_leaves_no_scores(model, photos, tmp_path, capsys, monkeypatch):
    """Not those of the methods before either."""
    call = NCSR.sample

    def limited(self, lr, n, temperature, *arguments, **options):
        if temperature > 0 and lr.shape[2] == 16:
            raise MemoryError
        return call(self, lr, n, temperature, *arguments, **options)

    monkeypatch.setattr(NCSR, "sample", limited)
    pair(tmp_path, (64, 64), (16, 16), "a.png")
    pair(tmp_path, (32, 32), (8, 8), "b.png")
    assert evaluate(model, tmp_path, "0.5", "--n", "2", "--json", tmp_path / "scores.json") == 1
    assert "a.png' with 2 samples does not fit in memory" in capsys.readouterr().err
    rows = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert [len(values) for row in rows for values in row["images"].values()] == [1] * sum(len(row["images"]) for row in rows)


def test_the_json_is_json(model, tmp_path):
    """Of an image that is one colour the PSNR is infinite, which JSON has no word for."""
    for kind, size in (("hr", 32), ("lr", 8)):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (size, size), (9, 9, 9)).save(tmp_path / kind / "flat.png")
    assert evaluate(model, tmp_path, "--json", tmp_path / "scores.json") == 0

    def refuse(word):
        raise AssertionError(word)

    scores = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)["scores"]
    assert scores[0]["images"]["psnr"] == [None] and scores[0]["means"]["psnr"] is None


def test_a_low_light_model_is_measured_on_pairs(low_light_model, photos, tmp_path, capsys):
    """With the reference's brightness and without: they differ by what the brightness does."""
    dark, files = tmp_path / "dark", list_images(photos)
    for file in files:
        write_image(dark / file.relative_to(photos), read_image(file) // 6)
    arguments = ["evaluate", str(photos), "--lr-images", str(dark), "--model", low_light_model]
    assert main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
    means = {row["method"]: row["means"] for row in json.loads((tmp_path / "scores.json").read_text())["scores"]}
    assert list(means) == ["dark", "temperature 0", "temperature 0, reference's brightness"]
    model, expected = NCSR.from_pretrained(low_light_model), {name: [] for name in means}
    for file in files:
        hr, low = read_image(file), read_image(dark / file.relative_to(photos))
        lr, margins = photograph_input(model, low)
        with torch.no_grad():
            condition = model.condition(lr)
            raw = crop_margins(condition.decode([latent[:, 0] for latent in condition.draw(1, 0.0)]), margins)[0]
        reference = hr.float() / 255
        for name, image in zip(means, (low.float() / 255, raw, match_brightness(raw, reference))):
            seen = (image.clamp(0, 1) * 255).round()
            expected[name].append(float(10 * torch.log10(255**2 / (seen - hr.float()).double().square().mean())))
    for name, values in expected.items():
        assert means[name]["psnr"] == pytest.approx(sum(values) / len(files), abs=1e-3)
    with mock.patch("ncsr_fast.cli.evaluate.lpips_or_none", side_effect=AssertionError("downloaded for nothing")):
        assert main(["evaluate", str(photos), "--model", low_light_model]) == 1
    assert "makes dark photographs bright: give the dark ones of the images, --lr-images" in capsys.readouterr().err


def test_warnings_name_the_image(model, photos, monkeypatch):
    monkeypatch.setattr("ncsr_fast.evaluation.Evaluation.add", lambda *_: warn_caller("it blew up") or "done")
    with pytest.warns(RuntimeWarning) as given:
        assert main(["evaluate", str(photos), "--model", model, "--limit", "2"]) == 0
    assert [str(warning.message) for warning in given] == [f"'{photos / name}.png': it blew up" for name in ("a", "b")]
