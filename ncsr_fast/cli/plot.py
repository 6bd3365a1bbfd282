"""`ncsr-fast plot`: plot the log of a training run."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import check_file, path

HELP = "plot the log of a training run"
EXAMPLE = """\
example:
  ncsr-fast plot runs/mine --out mine.png

The plot shows what RUN/log.jsonl contains of: losses, learning rate, gradient norm and skipped steps, quality at each
temperature, and the health of the inverse. The run may still be going on. The command needs matplotlib."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="folder of the run")
    parser.add_argument(
        "--out",
        metavar="PICTURE",
        type=path,
        help="file to write, in the format of its ending, else PNG (default: RUN/training.png)",
    )


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.training.plot import plot

    if args.out:
        check_file("--out", args.out)
    print(plot(args.run, args.out))
