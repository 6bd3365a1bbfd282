"""`ncsr-fast tune`: measure on this GPU which backend and which tiles each kernel should run in, and write its table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ncsr_fast.cli._common import check_file, path, why_no_cuda

HELP = "measure on this GPU which implementation of each operator is fastest, and use it from then on"
EXAMPLE = """\
example:
  ncsr-fast tune

Every candidate is compared with the float64 reference first, and then timed beside PyTorch's own operators, at the shapes of
the published models. The table goes to the folder ncsr_fast/gpus of $XDG_CONFIG_HOME, or ~/.config, and is read there; one
written elsewhere with --out is read where NCSR_FAST_TUNING_TABLE names it. `ncsr-fast doctor` shows what is used and why.
Without a GPU the exit status is 2."""
_NO_GPU = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", type=path, help="write the table there (default: the user's own)")
    parser.add_argument("--quick", action="store_true", help="the shapes of a training step of the ×4 model alone")


def run(args: argparse.Namespace) -> int:
    from ncsr_fast import files, places, tuning

    gpu = tuning.gpu()
    if gpu is None:
        print(f"ncsr-fast tune: there is no GPU to measure: {why_no_cuda()}", file=sys.stderr)
        return _NO_GPU
    file = Path(args.out) if args.out else tuning.user_folder() / tuning.file_name(gpu.name)
    packaged = sorted(tuning.PACKAGED.glob("*.json"))
    places.check_apart({"--out": [file]}, {"the package's table": packaged})
    check_file("--out", file)
    from ncsr_fast.benchmarks import tune

    table = tune.table_of(gpu, file, uses=tune.QUICK if args.quick else tune.USES)
    with files.atomic_write(file) as temporary:
        temporary.write_text(tuning.text(table), encoding="utf-8")
    print(f"written to {str(file)!r}" + (f", which is read where {tuning.USERS} names it" if args.out else ""))
    return 0
