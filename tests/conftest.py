"""Fixtures, and where the package under test was imported from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ncsr_fast

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU, slowly

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes of pytest-xdist share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # and what tests start has as many: bits depend on it

_REPORT = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def compiler_report(pytestconfig) -> list[str]:
    """Lines about compiled kernels, printed at the end of the run."""
    return pytestconfig.stash.setdefault(_REPORT, [])


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: its lines are printed by the one that started it
        session.config.workeroutput["compiler_report"] = session.config.stash.get(_REPORT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash.setdefault(_REPORT, []).extend(getattr(node, "workeroutput", {}).get("compiler_report", []))


def pytest_terminal_summary(terminalreporter, config) -> None:
    lines = sorted(set(config.stash.get(_REPORT, [])))
    if lines:
        terminalreporter.section("registers, shared memory and spills of the kernels")
        terminalreporter.write("\n".join(lines) + "\n")


def pytest_report_header() -> list[str]:
    return [f"ncsr_fast {ncsr_fast.__version__} from {ncsr_fast.__path__[0]}, torch {torch.__version__}"]


@pytest.fixture
def photos(tmp_path):
    """A folder of three smooth 96×120 pictures, one of them in a folder of its own."""
    return draw_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def kept_photos(tmp_path_factory):
    """The same, for all tests of a file."""
    return draw_photos(tmp_path_factory.mktemp("kept") / "photos")


def draw_photos(folder: Path) -> Path:
    (folder / "nested").mkdir(parents=True)
    y, x = np.mgrid[0:96, 0:120] / 30
    for index, name in enumerate(("a.png", "b.png", "nested/c.png")):
        channels = [128 + 90 * np.sin(x * (1 + index) + shift) * np.cos(y + shift * index) for shift in (0, 1, 2)]
        Image.fromarray(np.stack(channels, axis=2).round().astype(np.uint8)).save(folder / name)
    return folder
