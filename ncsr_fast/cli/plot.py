"""`ncsr-fast plot`: the log of a training run as a picture."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import check_file, path

HELP = "plot the log of a training run"
EXAMPLE = """\
example:
  ncsr-fast plot runs/mine --out mine.png

Losses, learning rate, gradient norm and skipped steps, quality at each temperature and the health of the inverse: what of
it RUN/log.jsonl has. Works while the run goes on. Needs matplotlib."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="folder of the run")
    parser.add_argument("--out", metavar="PICTURE", type=path, help="PNG, or what its name ends in (default: RUN/training.png)")


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.training.plot import plot

    if args.out:
        check_file("--out", args.out)
    print(plot(args.run, args.out))
