"""`ncsr-fast compare`: two reports of `ncsr-fast evaluate --protocol`."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import path

HELP = "say which differences of two reports exceed the noise"
EXAMPLE = """\
example:
  ncsr-fast compare srflow.json ncsr.json

The reports are those of `ncsr-fast evaluate --protocol … --json`, of the same images. Of each metric: both means, their
difference, its 95 % interval by the paired bootstrap over images, and whether that leaves room for 0. What it does not tell is
the noise of training: another seed of the same model may differ by more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", type=path, help="a report")
    parser.add_argument("second", metavar="B", type=path, help="another one")


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.evaluation.comparison import compare
    from ncsr_fast.evaluation.reports import read_report

    print(compare(read_report(args.first), read_report(args.second)).table())
