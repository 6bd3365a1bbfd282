"""The command: run the list, or make the table of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ncsr_fast.benchmarks.provenance import recorded_command

from .driver import read_rows, run_items
from .items import ITEMS
from .session import RESULTS, Setup
from .summary import readme_table, summary

SUMMARY = "summary.txt"


def main() -> int:
    """Exit status 1 where an item failed."""
    names = [item.name for item in ITEMS]
    parser = argparse.ArgumentParser(
        prog="python -m ncsr_fast.benchmarks.gpu",
        description="Check and measure everything on a GPU; results.jsonl, log.txt and summary.txt go to OUT.",
        allow_abbrev=False,  # the command is stored in the rows
    )
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)g)")
    parser.add_argument("--items", nargs="+", metavar="ITEM", choices=names, help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--published", type=Path, help="checkout of the published NCSR repository; left out without one")
    parser.add_argument("--tests", type=Path, help="folder `tests` of this package's checkout; left out without one")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--table", action="store_true", help="run nothing: print the README's table of the results in OUT")
    args = parser.parse_args()
    if args.table:
        print(readme_table(read_rows(args.out / RESULTS)))
        return 0
    paths = {args.published: "PATH", args.tests: "TESTS", args.out: "OUT"}
    command = recorded_command("ncsr_fast.benchmarks.gpu", sys.argv[1:], paths)
    absolute = {name: path and path.resolve() for name, path in (("published", args.published), ("tests", args.tests))}
    setup = Setup(args.out.resolve(), args.dry, command=command, **absolute)
    wanted = [item for item in ITEMS if item.name in (args.items or names)]
    rows = run_items(wanted, setup, args.minutes)
    text = summary(rows)
    (setup.out / SUMMARY).write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 1 if any(row["ok"] is False for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"python -m ncsr_fast.benchmarks.gpu: {error}")
