"""Benchmarks of the installed package: `ncsr-fast bench` for the operators, and for whole models and for training

    python -m ncsr_fast.benchmarks.end_to_end
    python -m ncsr_fast.benchmarks.training

registry: operators, their inputs and the shapes of the real models. harness: check, then time, one row at a time.
provenance: what a row says of the machine and the versions. report: the table and the plot made from stored rows.
"""

import sys

if __name__ != "ncsr_fast.benchmarks":  # as `python -m benchmarks` in a checkout, whose package may not be the installed one
    sys.exit(
        "benchmarks: this folder is measured as installed (`make dev` installs it): use `ncsr-fast bench`, "
        "`python -m ncsr_fast.benchmarks.end_to_end` or `python -m ncsr_fast.benchmarks.training`"
    )
