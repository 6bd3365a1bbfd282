"""`ncsr-fast evaluate` by the challenge's protocol and of the paper's tables, and `ncsr-fast compare`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation.folders import draw
from lpips_networks import squared_error
from PIL import Image

from ncsr_fast.cli.main import main
from ncsr_fast.data import read_image
from ncsr_fast.metrics import perceptual


@pytest.fixture
def folders(tmp_path):
    return draw(tmp_path, 2)


@pytest.fixture
def network(monkeypatch):
    """A distance in the place of LPIPS."""
    monkeypatch.setattr(perceptual, "lpips_model", lambda *_, **__: squared_error)


def run(*words) -> int:
    return main([str(word) for word in words])


def test_samples(folders, network, tmp_path, capsys):
    hr, sr = folders
    files = ["--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv"]
    assert run("evaluate", hr, "--samples", sr, "--scale", 4, "--n", 2, "--protocol", "ntire2021", *files) == 0
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["protocol"] == "ntire2021" and values["to_8bit"] is None and values["method"]["kind"] == "folder"
    assert set(values["means"]) == {"lpips", "lr_psnr", "lr_psnr_worst", "diversity", "psnr", "ssim"}
    assert [image["name"] for image in values["images"]] == ["0801.png", "0802.png"]
    assert values["means"]["psnr"] == pytest.approx(np.mean([image["psnr"] for image in values["images"]]))
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "name,lpips,lr_psnr,lr_psnr_worst,diversity,psnr,ssim"
    out, _ = capsys.readouterr()
    assert "note: 2 originals, fewer than the challenge's 100" in out and "LR-PSNR dB" in out


def test_the_year_of_samples_is_2021_unless_said(folders, network, tmp_path):
    hr, sr = folders
    assert run("evaluate", hr, "--samples", sr, "--n", 2, "--to-8bit", "truncate", "--json", tmp_path / "a.json") == 0
    values = json.loads((tmp_path / "a.json").read_text())
    assert (values["protocol"], values["to_8bit"], values["scale"]) == ("ntire2021", "truncate", 4)


def test_curves(tmp_path, network):
    hr, sr = draw(tmp_path, 2, 901)
    words = ["--samples", sr, "--n", 2, "--protocol", "ntire2022", "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv"]
    assert run("evaluate", hr, *words) == 0
    values = json.loads((tmp_path / "a.json").read_text())
    assert len(values["curves"]["lpips_score"]) == 2 and values["curves"]["mse_score"][0] == 0
    assert "mse_best_local_n2" in (tmp_path / "a.csv").read_text().splitlines()[0]


def test_a_model_is_its_samples(folders, model, network, tmp_path):
    """Those that `ncsr-fast sample` writes of the same LR images; but for the crop, the LR images are the protocol's."""
    from ncsr_fast.data import degrade, write_image
    from ncsr_fast.data.images import crop_to_multiple

    hr, _ = folders
    for file in sorted(hr.iterdir()):
        write_image(tmp_path / "lr" / file.name, degrade(crop_to_multiple(read_image(file), 8), 4))
    common = ["--model", model, "--n", 2, "--seed", 3, "--to-8bit", "truncate"]
    assert run("sample", tmp_path / "lr", "--out", tmp_path / "mine", "--temperature", 0.6, "--names", "ntire", *common) == 0
    words = ["evaluate", hr, "--protocol", "ntire2021"]
    assert run(*words, *common, "--temperatures", 0.6, "--nll", "--json", tmp_path / "a.json") == 0
    assert run(*words, "--samples", tmp_path / "mine", "--n", 2, "--json", tmp_path / "b.json") == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["to_8bit"] == "truncate" and first["method"]["temperature"] == 0.6
    assert first["means"]["bits_per_dim"] == pytest.approx(first["means"]["nll"] / 3)
    for image in first["images"]:
        del image["nll"], image["bits_per_dim"]
    assert first["images"] == second["images"]
    assert run(*words, *common, "--lr-images", tmp_path / "lr", "--temperatures", 0.6, "--json", tmp_path / "c.json") == 0
    assert json.loads((tmp_path / "c.json").read_text())["images"] == second["images"]


def test_bicubic(folders, network, tmp_path):
    hr, _ = folders
    assert run("evaluate", hr, "--protocol", "ntire2021", "--model", "bicubic", "--json", tmp_path / "a.json") == 0
    values = json.loads((tmp_path / "a.json").read_text())
    assert (values["n"], values["scale"], values["means"]["diversity"]) == (1, 4, 0)


def test_limit(folders, network, tmp_path):
    hr, sr = folders
    assert run("evaluate", hr, "--samples", sr, "--n", 2, "--limit", 1, "--json", tmp_path / "a.json") == 0
    assert len(json.loads((tmp_path / "a.json").read_text())["images"]) == 1


def test_problems_are_lines_and_nothing_is_measured(folders, network, tmp_path, capsys):
    hr, sr = folders
    (sr / "000000_sample00001.png").unlink()
    Image.new("RGB", (60, 70)).save(sr / "000001_sample00000.png")
    assert run("evaluate", hr, "--samples", sr, "--n", 2, "--json", tmp_path / "a.json") == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err and out == "" and not (tmp_path / "a.json").exists()
    assert err.count("\n") == 1 and "1 of 2 samples of original 000000 are missing" in err
    Image.new("RGB", (60, 70)).save(sr / "000000_sample00001.png")
    assert run("evaluate", hr, "--samples", sr, "--n", 2) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 problems:" and "000000_sample00001.png' is 70×60" in lines[1] and len(lines) == 4


def test_originals_too_small_for_lpips(tmp_path, network, capsys):
    hr, sr = draw(tmp_path, 2, sizes=((64, 64), (24, 64)))
    assert run("evaluate", hr, "--samples", sr, "--n", 2) == 1
    assert "0802.png' is 24×64, less than 32×32, too small to be measured" in capsys.readouterr().err


def test_without_lpips_the_rest_is_measured(folders, tmp_path, capsys):
    hr, sr = folders
    assert run("evaluate", hr, "--samples", sr, "--n", 2, "--json", tmp_path / "a.json") == 0
    out, err = capsys.readouterr()
    assert "without LPIPS: LPIPS needs the lpips package" in err and "note: without LPIPS" in out
    assert json.loads((tmp_path / "a.json").read_text())["means"]["lpips"] is None


@pytest.mark.parametrize(
    "words, said",
    [
        (["--samples", "SR", "--model", "bicubic"], "--model belongs to a model, and --samples are files"),
        (["--samples", "SR", "--temperatures", "0.5"], "--temperatures belongs to a model"),
        (["--samples", "SR", "--nll"], "--nll belongs to a model"),
        (["--protocol", "ntire2021", "--temperatures", "0.5", "0.9"], "one temperature at a time"),
        (["--scale", "4"], "--scale belongs to --protocol"),
        (["--protocol", "ntire2021", "--model", "llflow-compact"], "leave --protocol out, and give the dark photographs"),
        (["--generator-noise", "dense"], "--generator-noise belongs to --protocol"),
        (["--config", "a.yml"], "--config belongs to --table"),
        (["--table", "1"], "the folder of HR images does not belong to --table"),
        (["--samples", "nowhere"], "no folder 'nowhere' of samples"),
        (["--samples", "SR", "--json", "HR/a.json"], "HR/a.json' would be in the images"),
    ],
)
def test_options_that_do_not_go_together(folders, words, said, capsys):
    hr, sr = map(str, folders)
    words = [word.replace("SR", sr).replace("HR", hr) for word in words]
    assert run("evaluate", hr, *words) == 1
    err = capsys.readouterr().err
    assert (
        said in err.replace(hr, "HR").replace("'HR", "HR") and err.startswith("ncsr-fast evaluate: ") and err.count("\n") == 1
    )


def test_no_images(capsys):
    assert run("evaluate") == 1
    assert "give the folder of HR images" in capsys.readouterr().err


def test_to_8bit_of_temperatures(model, photos, tmp_path):
    words = ["evaluate", photos, "--model", model, "--n", 2, "--limit", 2, "--temperatures", 0.5]
    assert run(*words, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv") == 0
    assert run(*words, "--json", tmp_path / "b.json", "--to-8bit", "truncate") == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (first["to_8bit"], second["to_8bit"]) == ("round", "truncate")
    assert first["scores"][0]["means"] == second["scores"][0]["means"], "bicubic has no floats"
    assert first["scores"][1]["means"]["psnr"] != second["scores"][1]["means"]["psnr"]
    low, high = first["scores"][1]["intervals"]["psnr"]
    assert low <= first["scores"][1]["means"]["psnr"] <= high
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 and lines[1].startswith("a.png,bicubic,")


def test_to_8bit_of_samples_and_demo(model, tmp_path, capsys):
    """Truncation is never above rounding, and below it somewhere."""
    Image.fromarray(np.random.default_rng(0).integers(90, 160, (12, 16, 3), dtype=np.uint8)).save(tmp_path / "lr.png")
    for rule in ("round", "truncate"):
        words = ["--out", tmp_path / rule, "--model", model, "--n", 1, "--temperature", 0, "--to-8bit", rule]
        assert run("sample", tmp_path / "lr.png", *words, "--names", "ntire") == 0
        assert f"(8 bits: {rule})" in capsys.readouterr().out
    rounded, truncated = (read_image(tmp_path / rule / "000000_sample00000.png").int() for rule in ("round", "truncate"))
    assert torch.equal((rounded - truncated).unique(), torch.tensor([0, 1]))


def test_compare(folders, network, tmp_path, capsys):
    hr, sr = folders
    words = ["evaluate", hr, "--protocol", "ntire2021", "--json"]
    assert run(*words, tmp_path / "a.json", "--samples", sr, "--n", 2) == 0
    assert run(*words, tmp_path / "b.json", "--model", "bicubic") == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    out, err = capsys.readouterr()
    assert "LPIPS" in out and "95 % of the difference, 2 images" in out and "diversity and lr_psnr_worst are left out" in out
    assert run("compare", tmp_path / "a.json", hr / "0801.png") == 1
    assert "0801.png' cannot be read as a report" in capsys.readouterr().err


def test_table(folders, model, network, tmp_path, capsys):
    hr, sr = folders
    (tmp_path / "tables.yml").write_text(
        f"{{originals: {hr}, n: 2, tables: {{1: {{rows: {{NCSR: {{model: {model}, temperatures: [0]}}}}}}}}}}"
    )
    assert run("evaluate", "--table", 1, "--config", tmp_path / "tables.yml", "--out", tmp_path / "out") == 0
    out, _ = capsys.readouterr()
    assert "**Table 1.**" in out and "| RRDB | no trained model | 0.253 |" in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"reports", "table1.md", "table1.csv", "table1-tradeoff.png", "table1-temperatures.png"}


def test_table_of_nothing(capsys):
    """Without a configuration it is what the paper printed, and no LPIPS network is asked for."""
    assert run("evaluate", "--table", 1) == 0
    out, err = capsys.readouterr()
    assert out.count("no trained model") == 6 and err == ""
    assert run("evaluate", "--table", 1, "--n", 3) == 1
    assert "--n does not belong to --table" in capsys.readouterr().err
