"""Reports: intervals, files, and what two of them say of each other."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ncsr_fast.evaluation import Report, compare, mean_interval, paired_interval, read_report


def report(psnr, **changes) -> Report:
    """Of images 0 … with these PSNRs, and LPIPS from them."""
    rows = [{"lpips": (50 - value) / 100, "lr_psnr_worst": value, "diversity": value / 2, "psnr": value} for value in psnr]
    values = dict(
        protocol="ntire2021", scale=4, n=10, to_8bit="round", method={"kind": "folder"}, lpips="digest", notes=["x"],
        names=[f"{place}.png" for place in range(len(rows))], rows=rows,
    )  # fmt: skip
    return Report(**{**values, **changes})


RANDOM = np.random.default_rng(1)
FIRST = list(30 + 4 * RANDOM.normal(size=40))


def test_intervals_are_those_of_the_normal_approximation():
    low, high = mean_interval(FIRST)
    spread = 1.96 * np.std(FIRST) / math.sqrt(len(FIRST))
    assert (high + low) / 2 == pytest.approx(np.mean(FIRST), abs=0.05)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.05)
    assert mean_interval(FIRST) == (low, high), "the same draws"
    assert mean_interval(FIRST, seed=1) != (low, high)
    narrow = mean_interval(FIRST, level=0.5)
    assert low < narrow.low < narrow.high < high


def test_no_interval():
    assert mean_interval([1.0]) is None and mean_interval([1.0, math.inf]) is None and mean_interval([]) is None
    with pytest.raises(ValueError, match="there are 2 and 1"):
        paired_interval([1.0, 2.0], [1.0])


def test_pairs_are_narrower_than_their_parts():
    second = [value + 0.1 + 0.05 * noise for value, noise in zip(FIRST, RANDOM.normal(size=40))]
    low, high = paired_interval(FIRST, second)
    assert 0 < low < 0.1 < high < 0.2


def test_json_and_back(tmp_path):
    before = report(FIRST[:3], curves=[{"mse_mean": [1.0, 2.0 + place]} for place in range(3)])
    before.write_json(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["means"]["psnr"] == pytest.approx(np.mean(FIRST[:3]))
    assert values["intervals"]["psnr"] == pytest.approx(list(mean_interval(FIRST[:3])))
    assert values["images"][1] == {"name": "1.png", **before.rows[1], "curves": {"mse_mean": [1.0, 3.0]}}
    assert values["curves"] == {"mse_mean": [1.0, 3.0]} and values["to_8bit"] == "round"
    assert values["bootstrap"] == {"level": 0.95, "resamples": 10_000, "seed": 0}
    assert read_report(tmp_path / "a.json") == before


def test_infinite_values(tmp_path):
    before = report([30.0, math.inf])
    before.rows[1]["lpips"], before.rows[1]["diversity"] = 0.0, 1.0
    before.write_json(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert values["means"]["psnr"] is None and values["intervals"]["psnr"] is None
    assert read_report(tmp_path / "a.json") == before


def test_csv(tmp_path):
    report(FIRST[:2], curves=[{"mse_mean": [1.0, 2.0]}] * 2).write_csv(tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["0.png", "1.png"]
    assert float(rows[1]["psnr"]) == FIRST[1] and rows[0]["mse_mean_n2"] == "2.0"


def test_table():
    text = report([30.0, 32.0]).table()
    assert "PSNR dB              31.0000  [30.0000, 32.0000]" in text
    assert text.startswith("ntire2021, ×4, 2 images, 10 samples each, 8 bits: round") and text.endswith("note: x")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{}", "has no protocol, scale, n, method, images: it is no report of"),
        ('{"files": [], "scores": []}', "it is no report of"),
        ("[1]", "should be an object"),
        ("{", "cannot be read as a report"),
        ('{"protocol": "ntire2021", "scale": 4, "n": 1, "method": {}, "images": [{}]}', "a report: 'name'"),
    ],
)
def test_what_is_no_report(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_report(tmp_path / "a.json")


def test_comparison():
    second = report([value + 0.1 for value in FIRST])
    found = {difference.metric: difference for difference in compare(report(FIRST), second).differences}
    assert found["psnr"].verdict == found["lpips"].verdict == "better" and found["psnr"].exceeds_noise
    assert found["psnr"].interval.low == pytest.approx(0.1)
    back = {difference.metric: difference.verdict for difference in compare(second, report(FIRST)).differences}
    assert back["psnr"] == back["lpips"] == "worse"
    noise = report([value + (-1) ** place for place, value in enumerate(FIRST)])
    same = {difference.metric: difference.verdict for difference in compare(report(FIRST), noise).differences}
    assert set(same.values()) == {"within noise"}


def test_comparison_is_by_name():
    first, second = report(FIRST), report(FIRST)
    turned = replace(second, names=second.names[::-1], rows=second.rows[::-1])
    (difference,) = {found.second - found.first for found in compare(first, turned).differences}
    assert difference == 0 and all(found.interval == (0, 0) for found in compare(first, turned).differences)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"protocol": "ntire2022"}, "protocol is ntire2021 in the first and ntire2022 in the second"),
        ({"scale": 8}, "scale is 4 in the first and 8"),
        ({"lpips": "other"}, "LPIPS networks have other weights"),
        ({"names": [f"{place}.png" for place in range(1, 41)]}, "2 images are in one of them alone: '0.png', '40.png'"),
    ],
)
def test_reports_that_cannot_be_compared(changes, said):
    with pytest.raises(ValueError, match=said):
        compare(report(FIRST), report(FIRST, **changes))


def test_what_differs_is_told():
    found = compare(report(FIRST), report(FIRST, n=5, to_8bit="truncate"))
    assert {difference.metric for difference in found.differences} == {"lpips", "psnr"}
    assert [warning.split(":")[0] for warning in found.warnings] == [
        "A has 10 samples of each image and B 5", "8 bits are made otherwise, round in A and truncate in B",
    ]  # fmt: skip
    assert "note: A has 10" in found.table() and "within noise" in found.table()
