"""Benchmarks of the installed package: `ncsr-fast bench` for the operators; for whole models, for training, and for what a GPU
would be asked to do, without one

    python -m ncsr_fast.benchmarks.end_to_end
    python -m ncsr_fast.benchmarks.sizes
    python -m ncsr_fast.benchmarks.training
    python -m ncsr_fast.benchmarks.trace
    python -m ncsr_fast.benchmarks.cost_model

registry: operators, their inputs and the shapes of the real models. harness: check, then time, one row at a time.
fake_cuda: tensors that say they are on a GPU. launches: counts of kernels and bytes. waiting: what makes the host wait.
tune: measurements of `ncsr-fast tune`. cost_model: predicted times of the Triton kernels on GPUs.
provenance: what a row says of the machine and the versions. report: the table and the plot made from stored rows.
"""

import sys

if __name__ != "ncsr_fast.benchmarks":  # as `python -m benchmarks` in a checkout, whose package may not be the installed one
    sys.exit(
        "benchmarks: this folder is measured as installed (`make dev` installs it): use `ncsr-fast bench`, "
        "`python -m ncsr_fast.benchmarks.end_to_end` or `python -m ncsr_fast.benchmarks.training`"
    )
