"""`ncsr-fast evaluate --table`: a table of the paper, measured beside printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import check_folder, pick_device, raise_problems
from ncsr_fast.cli.evaluate import lpips_or_none

if TYPE_CHECKING:
    from ncsr_fast.evaluation.tables import Table

_OWN = {"table", "config", "out", "device", "command", "function"}


def run_table(args: argparse.Namespace, given: set[str]) -> None:
    """Measure or collect the rows that the configuration has, and write Markdown, CSV and plots; `given` names the options."""
    from tqdm import tqdm

    from ncsr_fast.evaluation.configuration import TableConfiguration, read_configuration
    from ncsr_fast.evaluation.names import BadFiles
    from ncsr_fast.evaluation.plots import write_plots
    from ncsr_fast.evaluation.tables import make_table, printed_numbers

    others = sorted(given - _OWN)
    if others:
        name = "the folder of HR images" if others[0] == "images" else f"--{others[0].replace('_', '-')}"
        raise ValueError(f"{name} does not belong to --table: its --config names what is measured")
    device = pick_device(args.device)
    out = None if args.out is None else check_folder("--out", args.out)
    configuration = TableConfiguration() if args.config is None else read_configuration(args.config, args.table)
    network = lpips_or_none(device) if configuration.measured else None
    try:
        table, problems = make_table(
            args.table, configuration, network=network, device=device, reports=out and out / "reports", progress=tqdm.write
        )
    except BadFiles as error:
        if len(error.problems) > 1:
            print(f"{len(error.problems)} problems:", *error.problems, sep="\n  ", file=sys.stderr)
        raise
    print(table.markdown())
    if out is not None:
        scale = configuration.scale or printed_numbers()["tables"][str(args.table)]["scale"] or _scale(table)
        for file in [*table.write(Path(out)), *write_plots(table, scale, Path(out))]:
            print(file)
    raise_problems(problems, len(problems) + sum(len(row.report.names) for row in table.rows if row.report), "measured")


def _scale(table: Table) -> int | None:
    """The scale of the reports, where they have one."""
    return next((row.report.scale for row in table.rows if row.report), None)
