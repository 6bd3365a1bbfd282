"""Everything to check and to measure on a machine with a GPU, as one program of a few minutes.

    python -m ncsr_fast.benchmarks.gpu OUT --minutes 9 --published PATH_TO_A_CHECKOUT_OF_NCSR --tests PATH/tests
    python -m ncsr_fast.benchmarks.gpu OUT --table

items: the list. driver: each item in a process of its own, with a deadline. session: what an item is given.
checks, linear_algebra, capture: right or wrong. models, tables: times. programs: tests and the trainer. summary: what came out.
"""
