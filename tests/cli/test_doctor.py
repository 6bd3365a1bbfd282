"""`ncsr-fast doctor`: what it shows, and what it advises."""

from __future__ import annotations

import torch

from ncsr_fast.cli.main import main


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in (
        "python",
        torch.__version__,
        "pydantic",
        "tensorboard",
        "onnxruntime",
        "huggingface-hub",
        "C++ compiler",
        "actnorm_invconv",
        "native",
        "triton",
        "available: ",
    ):
        assert text in out
