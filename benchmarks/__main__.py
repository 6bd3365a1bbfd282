"""`python -m benchmarks` from the repository root: `ncsr-fast bench` with this checkout's harness and results folder."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

# What is measured must be what was installed: the package in the checkout lacks the compiled module and the kernels.
_HERE = Path(__file__).resolve().parent
_search_path = list(sys.path)
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE.parent]
if importlib.util.find_spec("ncsr_fast") is None:
    sys.path[:] = _search_path


def main() -> None:
    from ncsr_fast.cli import bench

    from .run import run

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=bench.HELP[0].upper() + bench.HELP[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_arguments(parser)
    parser.set_defaults(out=_HERE / "results")
    try:
        run(parser.parse_args())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"python -m benchmarks: {error}")


if __name__ == "__main__":
    main()
