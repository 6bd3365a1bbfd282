"""Microbenchmarks of the operators: `python -m benchmarks` from the repository root, `ncsr-fast bench` from anywhere.

registry: operators, their inputs and the shapes of the real models. harness: check, then time, one row at a time.
provenance: what a row says of the machine and the versions. report: the table and the plot made from stored rows.
"""
