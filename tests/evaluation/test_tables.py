"""Tables of the paper: which rows are measured, collected or absent, and what stands beside them."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml
from evaluation.folders import draw
from lpips_networks import squared_error
from support import tiny_model

from ncsr_fast.data import read_image
from ncsr_fast.evaluation.configuration import TableConfiguration, read_configuration
from ncsr_fast.evaluation.names import BadFiles
from ncsr_fast.evaluation.plots import write_plots
from ncsr_fast.evaluation.tables import make_table, printed_numbers


@pytest.fixture
def folders(tmp_path):
    return draw(tmp_path, 2)


@pytest.fixture
def model(tmp_path):
    return str(tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model"))


def configured(tmp_path, number: int = 1, rows=None, printed=None, **common) -> TableConfiguration:
    file = tmp_path / "tables.yml"
    file.write_text(
        yaml.safe_dump({**common, "tables": {number: {"rows": rows or {}, "printed": printed or {}}}}, sort_keys=False)
    )
    return read_configuration(file, number)


def test_a_table(folders, model, tmp_path):
    hr, sr = folders
    rows = {
        "NCSR": {"model": model, "n": 3, "temperature": 0.6, "temperatures": [0, 0.9]},
        "folder": {"samples": str(sr)},
        "bicubic": {"model": "bicubic"},
        "SRFlow": {"model": str(tmp_path / "srflow.pth")},
    }
    configuration = configured(tmp_path, originals=str(hr), n=2, rows=rows)
    table, problems = make_table(1, configuration, network=squared_error, reports=tmp_path / "reports")
    assert not problems
    assert [row.name for row in table.rows] == [*printed_numbers()["tables"]["1"]["rows"], "folder", "bicubic"]
    by_name = {row.name: row for row in table.rows}
    ours = by_name["NCSR"]
    assert sorted(ours.sweep) == [0, 0.6, 0.9] and ours.report is ours.sweep[0.6]
    assert ours.report.n == 3 and ours.report.to_8bit == "truncate" and ours.printed["lr_psnr"] == 50.75
    assert by_name["folder"].report.n == 2 and by_name["folder"].report.to_8bit is None
    assert "is not there" in by_name["SRFlow"].absent and by_name["RRDB"].absent == "no trained model"
    text = table.markdown()
    measured = ours.report.means()
    assert f"| NCSR | {measured['lpips']:.3f} [" in text and "| 50.75 |" in text
    assert "| RRDB | no trained model | 0.253 | – | 0.00 | – | 49.20 |" in text
    assert "- 8 bits by truncate: NCSR." in text and "- 2 originals, fewer than" in text
    names = {file.name for file in (tmp_path / "reports").iterdir()}
    assert names == {f"table1-{name}.json" for name in ("NCSR@0", "NCSR@0.6", "NCSR@0.9", "bicubic", "folder")}
    table.write(tmp_path)
    with open(tmp_path / "table1.csv", newline="") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
    assert float(lines["NCSR"]["lr_psnr_measured"]) == measured["lr_psnr"]
    assert lines["RRDB"]["lr_psnr_measured"] == "" and lines["RRDB"]["lr_psnr_printed"] == "49.2"


@pytest.mark.slow
def test_plots(folders, model, tmp_path):
    hr, _ = folders
    rows = {"a $model": {"model": model, "temperatures": [0, 0.3]}}
    table, _ = make_table(1, configured(tmp_path, originals=str(hr), n=2, rows=rows), network=squared_error)
    files = write_plots(table, 4, tmp_path)
    assert [file.name for file in files] == ["table1-tradeoff.png", "table1-temperatures.png"]
    assert all(read_image(file).float().std() > 10 for file in files)


def test_rows_from_reports(folders, tmp_path):
    hr, sr = folders
    configuration = configured(tmp_path, originals=str(hr), n=2, rows={"theirs": {"samples": str(sr)}})
    before, _ = make_table(1, configuration, network=squared_error, reports=tmp_path)
    configuration = configured(tmp_path, rows={"theirs": {"report": str(tmp_path / "table1-theirs.json")}})
    after, _ = make_table(1, configuration)
    assert after.rows[-1].report == before.rows[-1].report


@pytest.mark.parametrize("number", [2, 5, 6])
def test_tables_without_printed_numbers(number, tmp_path):
    """What the package does not have it does not invent."""
    table, _ = make_table(number, TableConfiguration())
    assert table.rows == [] and f"has no printed numbers of table {number}" in table.markdown()
    printed = {"NCSR": {"lpips": 0.5}}
    table, _ = make_table(number, configured(tmp_path, number, printed=printed))
    assert "| NCSR | no trained model | 0.500 |" in table.markdown()
    assert "Printed: as the configuration has it." in table.markdown()


def test_printed_numbers_have_a_source():
    numbers = printed_numbers()
    for table in [*numbers["tables"].values(), *numbers["challenge"].values()]:
        assert bool(table["rows"]) == bool(table["source"])
        assert all({"lpips", "diversity", "lr_psnr"} == set(row) for row in table["rows"].values())


def test_bad_samples_are_found_before_anything_is_measured(folders, model, tmp_path):
    hr, sr = folders
    (sr / "000001_sample00001.png").unlink()
    rows = {"a": {"model": model}, "b": {"samples": str(sr)}}
    said = []
    with pytest.raises(BadFiles, match="000001_sample00001.png"):
        make_table(1, configured(tmp_path, originals=str(hr), n=2, rows=rows), network=squared_error, progress=said.append)
    assert said == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("original: here", "unknown key 'original'; do you mean originals"),
        ("tables: {7: {}}", "tables: unknown key '7'; there are 1, 2, 5, 6"),
        ("tables: {1: {rows: {a: {modle: b}}}}", "row 'a': unknown key 'modle'; do you mean model"),
        ("tables: {1: {rows: {a: {model: b, samples: c}}}}", "row 'a' has model and samples: give one of the two"),
        ("tables: {1: {rows: {a: {model: b}}}}", "originals must name the folder"),
        ("to_8bit: floor", "to_8bit must be one of"),
        ("protocol: ntire2020", "protocol must be one of ntire2021, ntire2022"),
        ("tables: [1]", "is of another kind"),
        ("tables: {1: {", "is no YAML"),
    ],
)
def test_bad_configurations(tmp_path, text, said):
    (tmp_path / "tables.yml").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_configuration(tmp_path / "tables.yml", 1)
    assert "tables.yml" in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_a_table_are_before_those_of_all(tmp_path):
    file = tmp_path / "tables.yml"
    file.write_text(json.dumps({"n": 10, "seed": 3, "tables": {"6": {"n": 4}, "1": None}}))
    six, one = read_configuration(file, 6), read_configuration(file, 1)
    assert (six.n, six.seed, one.n, six.to_8bit) == (4, 3, 10, "truncate")
