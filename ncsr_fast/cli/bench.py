"""`ncsr-fast bench`: check and time the operators at the shapes of the real models."""

from __future__ import annotations

import argparse

from ncsr_fast.cli._common import Gathered, add_device, count, path, seconds, thread_count

HELP = "check and time the operators beside PyTorch eager, torch.compile and a copy"
EXAMPLE = """\
example:
  ncsr-fast bench --operators affine_coupling flow_step --shapes x4-train --threads 2

Every result is compared with the float64 reference first; one that is wrong has a row with its error in place of figures,
and the exit status is 1. Rows go to OUT/operators-DEVICE.json. Shapes: x4-train and x8-train (batch 18, HR 160×160), sample
(one 40×40 LR image), large (one 160×160 LR image), div2k (one 510×340 LR image; by default on a GPU only), quick (toy).
Gradients are recorded, and backward passes measured, at the training shapes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several = {"nargs": "+", "metavar": "NAME", "action": Gathered}
    parser.add_argument("--operators", **several, help="(default: all)")
    parser.add_argument("--backends", **several, help="to compare with the reference (default: all this device has)")
    parser.add_argument("--shapes", **several, help="(default: all but quick, and div2k on a GPU only)")
    parser.add_argument(
        "--directions", **several, default=["forward", "inverse", "backward", "inverse-backward"], help="(default: all four)"
    )
    parser.add_argument("--dtype", **several, default=["float32"], help="float32, bfloat16, float16, or mixed: "
                        "bfloat16 networks on a float32 state (default: float32)")  # fmt: skip
    parser.add_argument("--layout", **several, default=["NCHW", "channels-last"], help="(default: NCHW and channels-last)")
    add_device(parser)
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--rounds", type=count, default=10, help="at least so many rounds of a case (default: %(default)s)")
    parser.add_argument("--seconds", type=seconds, default=0.2, help="as many more rounds as fit (default: %(default)s)")
    parser.add_argument(
        "--compile-shapes", **several, help="where torch.compile is a baseline (default: x4-train forward, sample inverse)"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, whose compilations take most time")
    parser.add_argument("--quick", action="store_true", help="three rounds of toy shapes, to see that everything runs")
    parser.add_argument("--out", default=".", type=path, help="folder of the rows (default: %(default)s)")
    parser.add_argument("--table", metavar="FILE", type=path, help="measure nothing: print the table of stored rows")
    parser.add_argument(
        "--plot", nargs=2, metavar=("FILE", "PICTURE"), type=path, help="measure nothing: plot stored rows (matplotlib)"
    )


def run(args: argparse.Namespace) -> None:
    from ncsr_fast.benchmarks.run import run

    run(args)
