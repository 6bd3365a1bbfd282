"""`ncsr-fast evaluate`: scores of folders, and of pairs that do not fit."""

from __future__ import annotations

import json

import pytest

from ncsr_fast.cli.main import main
from ncsr_fast.data import read_image


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
    from ncsr_fast.data import degrade, list_images, write_image

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
