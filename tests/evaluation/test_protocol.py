"""The challenge's measurements against an independent program, to its four decimals and closer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation.folders import draw
from evaluation.naive import measure
from lpips_networks import random_network, squared_error
from PIL import Image

from ncsr_fast.evaluation import PROTOCOLS, Bicubic, Folder, ImageMeasurement, evaluate_method, find_originals, find_samples
from ncsr_fast.evaluation import protocol as module
from ncsr_fast.evaluation.protocol import BestOf, box_sums
from ncsr_fast.warn import warn_caller


def evaluated(hr, sr, n: int, year: str, network, scale: int = 4):
    originals = find_originals(hr, PROTOCOLS[year])
    report, problems = evaluate_method(Folder(sr, find_samples(sr, originals, n, scale)), originals, scale, network=network)
    assert not problems
    return report


@pytest.fixture(params=["squared error", pytest.param("lpips", marks=pytest.mark.slow)])
def network(request):
    return squared_error if request.param == "squared error" else random_network()


@pytest.mark.parametrize("year, first, offset", [("ntire2021", 801, 0), ("ntire2022", 901, 0), ("ntire2022", 901, 901)])
@pytest.mark.parametrize("scale", [4, 8])
def test_parity(tmp_path, network, year, first, offset, scale):
    hr, sr = draw(tmp_path, 3, first, offset)
    report = evaluated(hr, sr, 3, year, network, scale)
    assert report.names == [f"{first:04d}.png", f"{first + 1:04d}.png"]
    for place, row in enumerate(report.rows):
        files = [sr / f"{offset + place:06d}_sample{index:05d}.png" for index in range(3)]
        values, curves = measure(hr / report.names[place], files, scale, network)
        assert row == pytest.approx(values, rel=1e-5, abs=1e-6)
        if year == "ntire2022":
            assert set(report.curves[place]) == set(curves)
            for name, curve in curves.items():
                assert report.curves[place][name] == pytest.approx(curve, rel=1e-5, abs=1e-5), name
        else:
            assert report.curves is None
    for name, mean in report.means().items():
        assert mean == pytest.approx(np.mean([row[name] for row in report.rows]))


def test_one_sample(tmp_path):
    hr, sr = draw(tmp_path, 1)
    report = evaluated(hr, sr, 1, "ntire2021", squared_error)
    assert {row["diversity"] for row in report.rows} == {0.0}
    assert all(row["lr_psnr"] == row["lr_psnr_worst"] for row in report.rows)


def test_samples_larger_than_the_crop_are_cropped(tmp_path):
    """Those of an LR image that was not made of the crop."""
    hr, sr = draw(tmp_path, 2)
    before = evaluated(hr, sr, 2, "ntire2021", squared_error)
    for file in sr.iterdir():
        pixels = np.asarray(Image.open(file))
        Image.fromarray(np.pad(pixels, ((0, 3), (0, 2), (0, 0)))).save(file)
    assert evaluated(hr, sr, 2, "ntire2021", squared_error).rows == before.rows


def test_without_lpips_the_report_says_so(tmp_path):
    hr, sr = draw(tmp_path, 2, 901)
    report = evaluated(hr, sr, 2, "ntire2022", None)
    assert report.means()["lpips"] is report.means()["diversity"] is None and report.means()["psnr"] > 20
    assert any("without LPIPS" in note for note in report.notes)
    assert set(report.curves[0]) == {f"mse_{name}" for name in ("mean", "best_local", "difference", "score")}


def test_batches_are_samples_one_by_one(tmp_path, monkeypatch):
    hr, sr = draw(tmp_path, 3, 901)
    together = evaluated(hr, sr, 3, "ntire2022", squared_error)
    monkeypatch.setattr(module, "_BATCH_PIXELS", {"cpu": 1})
    alone = evaluated(hr, sr, 3, "ntire2022", squared_error)
    assert alone.rows == together.rows and alone.curves == together.curves


def test_memory_does_not_grow_with_the_samples(monkeypatch):
    """No more than a batch of samples is measured at once, and of their maps the pixelwise smallest are held."""
    monkeypatch.setattr(module, "_BATCH_PIXELS", {"cpu": 2 * 64 * 72})
    original, batches = torch.randint(0, 256, (3, 64, 72), dtype=torch.uint8), []

    def network(a, b):
        batches.append(len(a))
        return squared_error(a, b)

    best = BestOf()
    monkeypatch.setattr(module, "BestOf", lambda **_: best)
    measurement = ImageMeasurement(original, 4, network)
    measurement.add(original.flip(1) for _ in range(7))
    kept = [value for value in vars(best).values() if isinstance(value, torch.Tensor)]
    assert batches == [2, 2, 2, 1] and [tensor.shape for tensor in kept] == [(64, 72)]
    assert all(mean.numel() == 1 for mean in best._means + best._local)


def test_the_original_is_measured_once():
    network = random_network_counted()
    original = torch.randint(0, 256, (3, 64, 72), dtype=torch.uint8)
    measurement = ImageMeasurement(original, 4, network)
    measurement.add([original.flip(1)] * 3)
    assert network.net.images == [1, 3], "its features, and those of a batch of three samples"


def random_network_counted():
    """The parts of an LPIPS network, with one layer that notes how many images it sees."""

    class Layer(torch.nn.Module):
        def forward(self, x):
            network.net.images.append(len(x))
            return x

    network = torch.nn.Module()
    network.scaling_layer, network.L, network.net = torch.nn.Identity(), 1, torch.nn.Module()
    network.net.slice1, network.net.images = [Layer()], []
    linear = torch.nn.Module()
    linear.model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1, bias=False))
    network.lins = torch.nn.ModuleList([linear])
    return network


def test_box_sums_by_hand():
    target = torch.zeros(3, 3, 5, dtype=torch.uint8)
    sample = target.clone()
    sample[:, 1, 2] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    sums = box_sums(sample[None], target)
    assert sums.shape == (1, 18, 20)
    assert sums[0, 1:17, 2:18].unique().tolist() == [14] and int(sums.sum()) == 14 * 256


def test_best_of_by_hand():
    best = BestOf()
    best.add(torch.tensor([[[3.0, 1.0]], [[1.0, 2.0]]]))
    assert [best.mean(n) for n in (0, 1, -1)] == [2.0, 1.75, 1.75]
    assert [best.best_local(n) for n in (0, 1)] == [2.0, 1.0]
    assert [best.difference(n) for n in (0, 1)] == [0.0, 0.5]
    assert best.score(0) == 0 and best.score(-1) == pytest.approx(100 / 3)


def test_an_original_equal_to_its_sample():
    original = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8)
    measurement = ImageMeasurement(original, 4, squared_error)
    measurement.add([original, original])
    assert measurement.values() == {
        "lpips": 0.0, "lr_psnr": np.inf, "lr_psnr_worst": np.inf, "diversity": 0.0, "psnr": np.inf, "ssim": 1.0,
    }  # fmt: skip


def test_images_that_cannot_be_measured_are_told(tmp_path):
    """What only their pixels tell."""
    hr, sr = draw(tmp_path, 2)
    originals = find_originals(hr, PROTOCOLS["ntire2021"])
    samples = find_samples(sr, originals, 2, 4)
    data = bytearray((sr / "000000_sample00001.png").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(20)
    (sr / "000000_sample00001.png").write_bytes(data)
    report, problems = evaluate_method(Folder(sr, samples), originals, 4, network=squared_error)
    assert report.names == ["0802.png"] and len(problems) == 1
    assert "0801.png: cannot read image" in problems[0] and "000000_sample00001.png" in problems[0]
    assert any("1 of 2 originals could not be measured" in note for note in report.notes)


def test_warnings_name_the_original(tmp_path):
    """Else that of the second would be the same as that of the first, and Python does not repeat one."""
    hr, _ = draw(tmp_path, 1)

    class Loud(Bicubic):
        def samples(self, place, lr):
            warn_caller("it blew up")
            yield from super().samples(place, lr)

    with pytest.warns(RuntimeWarning) as given:
        evaluate_method(Loud(4), find_originals(hr, PROTOCOLS["ntire2021"]), 4)
    assert [str(warning.message) for warning in given] == [f"'{hr / name}.png': it blew up" for name in ("0801", "0802")]
