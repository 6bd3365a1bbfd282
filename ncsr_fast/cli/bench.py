"""`ncsr-fast bench`: check and time the operators at the shapes of the real models."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import Gathered, add_device, count, path, seconds, thread_count

HELP = "check the operators, and time them, PyTorch eager, torch.compile and a copy"
EXAMPLE = """\
example:
  ncsr-fast bench --operators affine_coupling flow_step --shapes x4-train --threads 2

Every result is compared with the float64 reference first. If a result is wrong, its row contains the error instead of times,
and the exit status is 1. Rows are written to OUT/operators-DEVICE.json.

Shapes: x4-train and x8-train (batch 18, HR 160×160), sample (one 40×40 LR image), large (one 160×160 LR image), div2k (one
510×340 LR image; by default on a GPU only), quick (toy). Gradients are recorded, and backward passes measured, at the training
shapes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several = {"nargs": "+", "metavar": "NAME", "action": Gathered}
    parser.add_argument("--operators", **several, help="operators to measure (default: all)")
    parser.add_argument("--backends", **several, help="backends to measure besides the reference (default: all on this device)")
    parser.add_argument("--shapes", **several, help="shapes, listed below (default: all but quick; div2k only on a GPU)")
    directions = ["forward", "inverse", "backward", "inverse-backward"]
    parser.add_argument("--directions", **several, default=directions, help=f"{', '.join(directions)} (default: all four)")
    parser.add_argument("--dtype", **several, default=["float32"], help="float32, bfloat16, float16, or mixed, which is "
                        "bfloat16 networks on a float32 state (default: float32)")  # fmt: skip
    parser.add_argument("--layout", **several, default=["NCHW", "channels-last"], help="memory layouts (default: both)")
    add_device(parser)
    parser.add_argument("--threads", type=thread_count, help="number of CPU threads (default: PyTorch's choice)")
    parser.add_argument("--rounds", type=count, default=10, help="smallest number of rounds of a case (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=seconds, default=0.2, help="add rounds of a case for this many seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--compile-shapes", **several, help="shapes at which torch.compile is timed (default: x4-train forward, sample inverse)"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile: compiling takes most of the time")
    parser.add_argument("--quick", action="store_true", help="run three rounds of toy shapes, to see that everything runs")
    parser.add_argument("--out", default=".", type=path, help="folder to write the rows to (default: %(default)s)")
    parser.add_argument("--table", metavar="FILE", type=path, help="print the table of the rows in FILE, and measure nothing")
    parser.add_argument(
        "--plot",
        nargs=2,
        metavar=("FILE", "PICTURE"),
        type=path,
        help="plot the rows in FILE (matplotlib), and measure nothing",
    )


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.benchmarks.run import run

    run(args)
