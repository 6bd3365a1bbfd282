"""`ncsr-fast tune`: measure on this GPU which backend and which tiles are fastest for each kernel, and write its table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ncsr_fast.cli._common import check_file, path, why_no_cuda

HELP = "measure which backend of each operator is fastest on this GPU, and use it from then on"
EXAMPLE = """\
example:
  ncsr-fast tune

Every candidate is first compared with the float64 reference. Then the candidates and PyTorch's own operators are timed at the
shapes of the published models. The table is written to the folder ncsr_fast/gpus in $XDG_CONFIG_HOME or ~/.config, where the
package reads it. A table written elsewhere with --out is read if NCSR_FAST_TUNING_TABLE names it. `ncsr-fast doctor` shows what
is used and why. Without a GPU the exit status is 2."""
_NO_GPU = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", type=path, help="file to write the table to (default: the user's table)")
    parser.add_argument("--quick", action="store_true", help="measure only the shapes of a training step of the ×4 model")


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
    print(f"written to {str(file)!r}" + (f", which is read if {tuning.USERS} names it" if args.out else ""))
    return 0
