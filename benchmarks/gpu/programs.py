"""Whole programs: a selection of the tests, and the trainer from photographs on disk."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ncsr_fast.benchmarks.harness import rounded
from ncsr_fast.cli.main import main
from ncsr_fast.data import write_image

from .session import Session

_STEPS, _UNFREEZE_AT = 20, 10
_IMAGES = 8
# those that have cells for a GPU: the operators' values, Triton's arithmetic, capture and synchronisation
_FILES = ("ops/test_operators.py", "kernels/test_triton_maths.py", "engine/test_synchronization.py")
_SELECTED = "(test_operators and {device} and values and float32) or test_triton_maths or test_synchronization"


def tests(session: Session) -> None:
    """A selection of the tests, by pytest with a process for each of 8 cores."""
    folder = session.setup.tests
    if folder is None:
        session.skip("all", "no --tests")
        return
    session.part("selection", _pytest, session, folder)


def trainer(session: Session) -> None:
    """`ncsr-fast train` of a few steps with workers, an encoder that is trained from the middle on, and its account."""
    with tempfile.TemporaryDirectory() as folder:
        session.part("train", _train, session, Path(folder))


def _pytest(session: Session, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(folder.parent / "pyproject.toml")]
    command += [*(str(folder / name) for name in _FILES), "-k", _SELECTED.format(device=session.device)]
    # a dry run is itself in the tests: it looks whether there are such tests
    command += ["--collect-only"] if session.setup.dry else ["-n", "8", "--dist", "worksteal", "--maxfail", "20"]
    seconds = max(1.0, session.left() - 2)
    with tempfile.TemporaryDirectory() as elsewhere:  # so that what is tested is what is installed
        said = Path(elsewhere, "said.txt")
        with said.open("w") as file:
            process = subprocess.Popen(command, cwd=elsewhere, stdout=file, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        text = said.read_text(encoding="utf-8")
    print(text, flush=True)
    lines = [line for line in text.splitlines() if line.strip()] or ["pytest said nothing"]
    if status != 0:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        late = f"pytest did not end in {seconds:.0f} s; the last it said:"
        raise RuntimeError("\n".join([*failed[:20], *([late] if status is None else []), lines[-1]]))
    return {"closing": lines[-1]}


def _train(session: Session, folder: Path) -> dict[str, Any]:
    crop = session.sizes.config.scale * session.sizes.lr
    generator = torch.Generator().manual_seed(0)
    for number in range(_IMAGES):
        picture = torch.randint(256, (3, 2 * crop, 2 * crop), dtype=torch.uint8, generator=generator)
        write_image(folder / "images" / f"{number}.png", picture)
    steps, workers = (4, 1) if session.setup.dry else (_STEPS, 4)
    options = {
        "images": folder / "images", "run": folder / "run", "device": session.device, "encoder-steps": 0, "steps": steps,
        "unfreeze": _UNFREEZE_AT / _STEPS, "workers": workers, "batch": session.sizes.batch, "crop": crop, "log-every": 1,
        "precision": "bf16", "validation-images": 1, "validation-size": crop, "temperatures": 0.8,
    }  # fmt: skip
    model = [f"{name}={_word(value)}" for name, value in session.sizes.config.to_dict().items()]
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    status = main(["train", "--preset", "ncsr-x4", "--model", *model, *arguments])
    if status:
        raise RuntimeError(f"ncsr-fast train: exit status {status}; what it said is in the log")
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    if len(losses) != steps:
        raise RuntimeError(f"{len(losses)} of {steps} steps are in the log")
    rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return {"first_loss": losses[0], "last_loss": losses[-1], "images_per_s": rounded(sorted(rates)[len(rates) // 2])}


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
