"""Launches, bytes and FLOPs of a training step and of sampling on a GPU, counted on fake tensors, so that it takes no GPU.

    python -m ncsr_fast.benchmarks.trace --json trace.json
    python -m ncsr_fast.benchmarks.trace --backend triton --precisions bf16 --json trace-triton.json

The ×4 model of the paper at full size runs on tensors without memory that say they are on a GPU (`fake_cuda`); `launches` says
what the numbers mean. They are the same at every run and on every machine, and change with the code and the version of PyTorch.
A pass that would make the host wait for the GPU, or that mixes devices, is refused.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ncsr_fast import NCSR, NCSRConfig, graphs
from ncsr_fast.compat.structure import skeleton_of
from ncsr_fast.engine.options import PRECISIONS
from ncsr_fast.files import atomic_write
from ncsr_fast.training.batch import Draws
from ncsr_fast.training.settings import TrainSettings
from ncsr_fast.training.stages import FlowStage

from .fake_cuda import fake_cuda
from .launches import LaunchCounter
from .provenance import provenance, recorded_command
from .report import to_json, trace_table
from .waiting import NoWaiting

Pass = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """A pass through a model of a preset, on fake tensors.

    Attributes:
        name: Of its rows.
        what: A description.
        prepare: Makes the pass, of a model on the fake GPU.
    """

    name: str
    what: str
    prepare: Callable[[NCSR], Pass]


def training_step(model: NCSR, batch: int = 18, crop: int = 160) -> Pass:
    """The trainer's step, from bytes to new weights, with the encoder trained too."""
    settings = TrainSettings(model=model.config, images=("none",), batch=batch, crop=crop, precision=model.precision)
    stage = FlowStage(model.train(), settings)
    stage.begin_phase(1)
    optimizer = graphs.adam(stage.groups(), lr=settings.lr)
    step = graphs.TrainingStep(
        stage.objective,
        optimizer,
        max_grad_norm=settings.max_grad_norm,
        loss=lambda objective, *inputs: objective(*inputs),
        graph=False,
    )
    hr = torch.zeros(batch, 3, crop, crop, dtype=torch.uint8, device="cuda")
    draws = Draws(
        std=torch.rand(batch, 1, 1, 1, device="cuda"),
        noise=torch.randn(batch, 3, crop, crop, device="cuda"),
        flips=torch.zeros(batch, dtype=torch.bool, device="cuda"),
        turns=torch.zeros(batch, dtype=torch.int64, device="cuda"),
        reference=torch.zeros(batch, dtype=torch.bool, device="cuda"),
    )
    step(hr, None, *draws)  # makes what later steps find: the optimizer's state, and constants of the degradation
    return lambda: step(hr, None, *draws)


def sampling(model: NCSR, height: int, width: int, n: int = 10) -> Pass:
    """`n` samples of one LR image."""
    sampler, lr = graphs.Sampler(model.eval(), n, graph=False), torch.rand(1, 3, height, width, device="cuda")
    return lambda: sampler(lr)


TASKS = (
    Task("train-b18", "a step of the trainer, batch 18 of 160×160, encoder trained too", training_step),
    Task("sample-40x40-n10", "10 samples, LR 40×40", lambda model: sampling(model, 40, 40)),
    Task("sample-div2k-n10", "10 samples, LR 340×510", lambda model: sampling(model, 340, 510)),
)


def fake_model(config: NCSRConfig, precision: str = "fp32") -> NCSR:
    """A model whose parameters have no memory, and are the fake GPU's inside `fake_cuda`."""
    model = copy.deepcopy(skeleton_of(config))
    model.precision = precision
    return model


def row_of(task: Task, precision: str, backend: str = "auto") -> dict[str, Any]:
    """The row of a task, without its provenance.

    Args:
        task: One of `TASKS`.
        precision: One of `PRECISIONS`.
        backend: Of the operators, as `EngineOptions` has it; "auto" is what the tables say of any GPU.

    Raises:
        HostWaits: Where an operator makes the host wait for the GPU.
        MixedDevices: Where one is given tensors of the CPU too.
    """
    with fake_cuda():
        model = fake_model(NCSRConfig.preset("ncsr-x4"), precision)
        model.options = replace(model.options, backend=backend)
        run = task.prepare(model)
        with LaunchCounter() as counter, NoWaiting():
            run()
    parts = {name: asdict(count) for name, count in sorted(counter.parts.items())}
    described = {"task": task.name, "precision": precision, "backend": backend}
    return {**described, **asdict(counter.total), "what": task.what, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ncsr_fast.benchmarks.trace", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to it")
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], help="(default: all)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="(default: all)")
    parser.add_argument("--backend", choices=("auto", "reference", "triton"), default="auto", help="of the operators")
    args = parser.parse_args()
    where = provenance("cpu") | {"device": "fake GPU"}
    where["command"] = recorded_command("ncsr_fast.benchmarks.trace", sys.argv[1:], {args.json: "FILE"})
    rows = []
    for task in TASKS:
        if args.tasks is None or task.name in args.tasks:
            rows += [row_of(task, precision, args.backend) | where for precision in args.precisions]
    print(trace_table(rows))
    if args.json:
        with atomic_write(args.json) as path:
            path.write_text(to_json(rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
