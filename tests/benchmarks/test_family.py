"""The comparison of members of the family with their published programs, of which stand-ins are run."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
from compat import family as standins

from ncsr_fast import NCSRConfig
from ncsr_fast.benchmarks import arms, pages
from ncsr_fast.benchmarks import family as benchmark

SMALL = {"llflow-lol": {"channels": 4, "growth": 2, "blocks": 2, "stacked_blocks": (1,), "steps": 1, "hidden_channels": 4}}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """main() of a small LLFlow; returns its rows."""
    config = replace(NCSRConfig.preset("llflow-lol"), **SMALL["llflow-lol"])
    monkeypatch.setattr(benchmark.NCSRConfig, "preset", lambda name: config)
    monkeypatch.setattr(benchmark, "IMAGES", 2)
    monkeypatch.setattr(benchmark, "provenance", lambda device: {"device": "this", "threads": 1, "torch": "2", "date": "now"})
    monkeypatch.setattr(benchmark, "__spec__", Namespace(name="family"), raising=False)

    def run(kind: type[standins.Network]) -> list[dict]:
        def network(checkout, config):
            options = benchmark.published_options(config)
            sizes = {"gc": config.growth}
            flow = {"CondAffineSeparatedAndCond": {"hidden_channels": config.hidden_channels}}
            options["network_G"] |= sizes | {"flow": options["network_G"]["flow"] | flow}
            return kind(options)

        monkeypatch.setattr(benchmark, "published_network", network)
        arguments = [
            "--published",
            f"llflow-lol={tmp_path}",
            "--lr-size",
            "16",
            "--rounds",
            "2",
            "--out",
            str(tmp_path),
        ]
        monkeypatch.setattr(sys, "argv", ["family", *arguments])
        benchmark.main()
        return json.loads((tmp_path / benchmark.STORED).read_text())

    return run


@pytest.mark.slow
def test_every_arm_has_a_row_and_the_page_a_line(measured, tmp_path, monkeypatch):
    rows = measured(standins.LLFlow)
    assert [(row["task"], row["arm"]) for row in rows] == [
        (task, arm) for task in ("sample", "train") for arm in (arms.PUBLISHED, arms.ACCELERATED, arms.OURS)
    ]
    assert all(0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["rounds"] == 2 for row in rows)
    assert "llflow-lol=PATH" in rows[0]["command"] and str(tmp_path) not in rows[0]["command"]
    assert len(measured(standins.LLFlow)) == len(rows)  # measured anew
    monkeypatch.setattr(pages, "FAMILY", tmp_path / benchmark.STORED)
    assert "| `llflow-lol`, 2 images, LR 16×16" in pages.family()


class Wrong(standins.LLFlow):
    def top(self, z, features):
        return super().top(z, features) + 1

    def decode(self, *arguments):
        image, logdet = super().decode(*arguments)
        return image * 1.01, logdet


@pytest.mark.slow
def test_an_arm_whose_results_differ_has_its_error_for_figures(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "accelerate", lambda network: None)
    with pytest.raises(ValueError, match="2 arms failed\n  llflow-lol, 2 images, LR 16×16, published: its result is off by"):
        measured(Wrong)
    rows = json.loads((tmp_path / benchmark.STORED).read_text())
    assert [("error" in row) for row in rows] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    "text, complaint", [("llflow-lol", "takes SYSTEM=CHECKOUT"), ("flow=.", "'flow=.'"), ("ncsr-x4=no", "'no'")]
)
def test_arguments_that_are_no_system_and_checkout(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        benchmark._system(text)


def test_a_folder_without_a_program(tmp_path):
    with pytest.raises(ValueError, match="has no folder models/modules"):
        benchmark.published_network(tmp_path, NCSRConfig.preset("llflow-lol"))


@pytest.mark.parametrize("name", ["fs-ncsr-x4", "srflow-da-x4", "srflow-da-s-x8", "llflow-lol-smallnet", "ctflow"])
def test_options_describe_the_architecture(name):
    assert NCSRConfig.from_published(benchmark.published_options(NCSRConfig.preset(name)) | {"divide_freq": "fs" in name}) == (
        NCSRConfig.preset(name)
    )
