"""Fixtures, and where the package under test was imported from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import installation
import numpy as np
import pytest
import torch
from PIL import Image

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


def pytest_configure() -> None:
    try:
        installation.check()
        if name := os.environ.get("NCSR_FAST_INSTRUCTION_SET"):  # a lesser one than the widest of this CPU
            from ncsr_fast import _native

            _native.use_instruction_set(name)
    except (installation.Incomplete, ValueError) as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    """Make no test of the cells that its predicates (`operator_cases.where`) leave out."""
    found = yield
    if not isinstance(found, list):  # of functions: one for each set of parameters
        return found
    return [item for item in found if all(_holds(item, *mark.args) for mark in item.iter_markers("cells_where"))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they are."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("device") == "cuda":
            item.add_marker("gpu")
        elif parameters.get("backend") == "triton":
            item.add_marker("interpreter")
        for mark in item.iter_markers("cells_marked"):
            name, *condition = mark.args
            if _holds(item, *condition):
                item.add_marker(name)
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")


def _holds(item: pytest.Item, predicate: Callable[..., bool], names: tuple[str, ...]) -> bool:
    """Whether a predicate holds for those parameters of a test."""
    return predicate(*(item.callspec.params[name] for name in names))


def pytest_report_header() -> list[str]:
    import ncsr_fast

    return [f"ncsr_fast {ncsr_fast.__version__} from {ncsr_fast.__path__[0]}, torch {torch.__version__}"]


@pytest.hookimpl(trylast=True)  # one after the other on the same arguments, whose expected results a test may keep
def pytest_generate_tests(metafunc) -> None:
    if "instruction_set" in metafunc.fixturenames:
        from ncsr_fast import _native

        metafunc.parametrize("instruction_set", _native.instruction_sets(), indirect=True)


@pytest.fixture
def instruction_set(request):
    """Each instruction set that the compiled module has for this CPU, in use during the test."""
    from ncsr_fast import _native

    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
