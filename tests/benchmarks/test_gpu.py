"""The program for a machine with a GPU: all of it runs, and what fails, hangs or no longer fits is told and stops nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from forks import Fork
from installation import CHECKOUT

from ncsr_fast import graphs, ops
from ncsr_fast.benchmarks.gpu import capture, checks, driver, linear_algebra, models, session, summary
from ncsr_fast.engine.ablation import Ablation, ablation

_PROGRAM = "import runpy; runpy.run_module('ncsr_fast.benchmarks.gpu', run_name='__main__', alter_sys=True)"
# items that pass, fail in a part, raise, end their process, hang, and hang where no signal but SIGKILL is heard
_ITEMS = """
import json, os, signal, sys, time
from pathlib import Path
from ncsr_fast.benchmarks.gpu.driver import Item, run_items
from ncsr_fast.benchmarks.gpu.session import Setup

def passing(session):
    session.part("first", lambda: {"value": 1})

def failing(session):
    session.part("good", lambda: {"value": 1})
    session.part("bad", lambda: {}["nothing"])
    session.part("after", lambda: {"value": 2})

def raising(session):
    raise RuntimeError("out of luck")

def ending(session):
    session.part("before", lambda: {"value": 3})
    os.kill(os.getpid(), signal.SIGSEGV)

def leaving(session):
    os._exit(1)

def hanging(session):
    session.part("before", lambda: {"value": 4})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        Path("grandchild").write_text(str(os.getpid()))
    time.sleep(600)

def late(session):
    session.part("late", lambda: {"value": 5})

def forked(session):
    import torch
    session.part("fork", lambda: {"no_gpu_for_forks": getattr(torch.cuda, "_is_in_bad_fork", bool)()})

items = [Item(name, globals()[name], float(seconds)) for name, _, seconds in (word.partition("=") for word in sys.argv[2:])]
run_items(items, Setup(Path("out"), dry=True), float(sys.argv[1]))
"""


def rows_of(folder: Path, minutes: float, **items: float) -> dict[tuple[str, str | None], dict]:
    """The rows of a run of `_ITEMS`, each with its seconds, by item and part."""
    fork = Fork(_ITEMS, str(minutes), *(f"{name}={seconds}" for name, seconds in items.items()), folder=folder)
    assert fork.wait() == 0, fork.errors
    rows = driver.read_rows(folder / "out" / session.RESULTS)
    assert [row["item"] for row in rows if row["part"] is None] == list(items), "each item is closed, in order"
    return {(row["item"], row["part"]): row for row in rows}


@pytest.mark.slow
def test_what_fails_stops_nothing(tmp_path):
    rows = rows_of(tmp_path, 1, failing=5, raising=5, ending=5, leaving=5, passing=5)
    oks = {key: row["ok"] for key, row in rows.items()}
    assert oks == {
        ("failing", "good"): True, ("failing", "bad"): False, ("failing", "after"): True, ("failing", None): False,
        ("raising", None): False, ("ending", "before"): True, ("ending", None): False, ("leaving", None): False,
        ("passing", "first"): True, ("passing", None): True,
    }  # fmt: skip
    assert rows["failing", "after"]["figures"] == {"value": 2} and rows["failing", "bad"]["figures"] == {}
    assert rows["failing", "bad"]["error"].splitlines()[-1] == "KeyError: 'nothing'"
    assert "in <lambda>" in rows["failing", "bad"]["error"], "the lines of the traceback"
    assert rows["failing", None]["error"] == "1 of its parts failed: bad"
    assert rows["raising", None]["error"].endswith("RuntimeError: out of luck")
    assert rows["ending", None]["error"].endswith("its process ended with status -11")
    assert rows["leaving", None]["error"].endswith("its process ended with status 1")
    assert "Segmentation fault" in rows["ending", None]["error"], "and where it was"


@pytest.mark.slow
def test_an_item_that_hangs_is_killed_with_all_it_started(tmp_path):
    rows = rows_of(tmp_path, 1, hanging=0.5, passing=5)
    assert rows["hanging", "before"]["ok"] and rows["passing", None]["ok"]
    closing = rows["hanging", None]
    assert closing["ok"] is False and closing["error"].endswith("killed after 1 s")
    assert "in hanging" in closing["error"], "where it was, by faulthandler"
    assert 1 <= closing["seconds"] < 30
    state = Path("/proc", (tmp_path / "grandchild").read_text(), "stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_what_no_longer_fits_is_skipped(tmp_path):
    rows = rows_of(tmp_path, 0.5, passing=1, late=600, failing=5)
    assert rows["late", None]["ok"] is None and ("late", "late") not in rows
    reason = rows["late", None]["error"]
    assert reason.startswith("it takes 600 s, and ") and reason.endswith("s of 0.5 minutes are left")
    assert rows["passing", None]["ok"] and rows["failing", "after"]["ok"], "shorter ones after it are run"


def test_forks_can_have_a_gpu(tmp_path):
    """The driver has not asked CUDA for devices: where a process has, PyTorch refuses its forks."""
    assert rows_of(tmp_path, 1, forked=5)["forked", "fork"]["figures"] == {"no_gpu_for_forks": False}


def test_a_part_near_the_deadline_is_skipped(tmp_path):
    setup = session.Setup(tmp_path)
    near = session.Session(setup, "item", 0.0)
    assert near.part("part", lambda: {"value": 1}) == {} and not near.failed
    (row,) = driver.read_rows(tmp_path / session.RESULTS)
    assert (row["part"], row["ok"], row["error"]) == ("part", None, "the deadline of the item is near")


def command(folder: Path, *arguments: str, **environment: str) -> Fork:
    fork = Fork(_PROGRAM, "out", *arguments, folder=folder, **environment)
    fork.status = fork.wait()
    return fork


@pytest.mark.slow
def test_the_whole_list_runs_dry(tmp_path):
    """On a CPU, at tiny sizes, without capture: each line of Python of it but the published program's."""
    fork = command(tmp_path, "--dry", "--tests", str(CHECKOUT / "tests"))
    rows = driver.read_rows(tmp_path / "out" / session.RESULTS)
    assert [row for row in rows if row["ok"] is False] == []
    assert fork.status == 0, fork.errors
    assert {(row["item"], row["error"]) for row in rows if row["ok"] is None} == {("published", "no --published")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.jsonl", "summary.txt"]
    machine = next(row for row in rows if row["part"] == "machine")
    assert machine["figures"]["command"] == "python -m ncsr_fast.benchmarks.gpu OUT --dry --tests TESTS"
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert text.strip() in fork.out and text.startswith("this was a dry run")
    assert "## failed" not in text and "training, bf16, graph: " in text and "× aten::" in text
    table = command(tmp_path, "--table")
    assert table.status == 1 and table.out == ""
    assert table.errors.endswith("these are the results of a dry run, whose times mean nothing\n")


_STAND_IN = """
from compat.standin import StandInNCSR

class NCSRNet(StandInNCSR):
    def __init__(self, in_nc, out_nc, nf, nb, gc, scale, K, opt):
        network = opt["network_G"]
        super().__init__(opt | {"network_G": network | {"nf": nf, "gc": gc, "nb": nb}})
"""


@pytest.mark.slow
def test_the_published_program_runs_dry(tmp_path):
    """A stand-in of it, in a checkout of the same form."""
    folder = tmp_path / "ncsr" / "code" / "models" / "modules"
    folder.mkdir(parents=True)
    (folder / "NCSRNet_arch.py").write_text(f"import sys\nsys.path.append({str(CHECKOUT / 'tests')!r})\n{_STAND_IN}")
    fork = command(tmp_path, "--dry", "--items", "published", "--published", "ncsr")
    rows = driver.read_rows(tmp_path / "out" / session.RESULTS)
    assert [row for row in rows if not row["ok"]] == [] and fork.status == 0, fork.errors
    parts = ("built", "training step", "samples, LR 4×4", "samples, LR 4×6")
    names = [f"{part}, {name}" for name in ("as it is", "accelerated") for part in parts]
    assert [row["part"] for row in rows] == [*names, None]


@pytest.mark.slow
def test_the_exit_status_tells_of_a_failure(tmp_path):
    """A selection of tests that are not there fails."""
    (tmp_path / "pyproject.toml").touch()
    fork = command(tmp_path, "--dry", "--items", "tests", "linear-algebra", "--tests", "tests")
    assert fork.status == 1
    assert re.search(r"^tests +FAILED", fork.out, re.MULTILINE) and re.search(r"^linear-algebra +ok", fork.out, re.MULTILINE)
    assert "## failed\ntests, selection:\n    " in fork.out


def row(item: str, part: str | None = None, ok: bool | None = True, dry: bool = False, **figures) -> dict:
    return {
        "item": item,
        "part": part,
        "ok": ok,
        "seconds": 1.0,
        "error": None if ok else "torn\noff",
        "figures": figures,
        "dry": dry,
    }


MACHINE = row("ceilings", "machine", device="a GPU", torch="2.11", commit="abc", command="python -m it", triton=None)
MEASURED = [
    MACHINE,
    row("sampling", "bf16, graph", median_s=0.01, samples=10),
    row("sampling", "tf32, graph", median_s=0.02, samples=10),
    row("sampling-div2k", "bf16, graph", median_s=0.2, samples=10),
    row("sampling-div2k", "tf32, graph", ok=False),
    row("training", "bf16, graph", median_s=0.05),
    row("published", "samples, LR 40×40, as it is", median_s=0.5, samples=10),
    row("published", "samples, LR 340×510, as it is", median_s=0.25, samples=1),
]


def test_the_table_of_the_readme():
    lines = summary.readme_table(MEASURED).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[0] == ["`ncsr-x4`, a GPU", "published program, TF32", "ncsr_fast, TF32", "ncsr_fast, bf16"]
    assert cells[2:] == [
        ["10 samples, LR 40×40", "500 ms", "20 ms (25.0×)", "10 ms (50.0×)"],
        ["10 samples, LR 340×510", "2.5 s", "–", "200 ms (12.5×)"],
        ["training step, batch 18 of 160×160", "–", "–", "50 ms"],
    ]
    assert lines[-1] == "torch 2.11, commit abc; `python -m it`"


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ([*MEASURED, row("ceilings", dry=True)], "the results of a dry run"),
        ([*MEASURED, row("engine", ok=False)], "engine failed in this run: there is no table"),
        (MEASURED[1:], "what machine these results are of is not among them"),
        ([MACHINE], "neither samples nor training steps were measured"),
    ],
)
def test_no_table_of_results_that_mean_nothing(rows, complaint):
    with pytest.raises(ValueError, match=complaint):
        summary.readme_table(rows)


@pytest.fixture
def at_work(tmp_path):
    """A session of an item of a dry run."""
    setup = session.Setup(tmp_path, dry=True, scratch=tmp_path)
    return session.Session(setup, "item", float("inf"))


def failures(at_work) -> set[str]:
    """The parts that failed."""
    rows = driver.read_rows(at_work.setup.out / session.RESULTS)
    return {row["part"] for row in rows if row["ok"] is False}


def test_a_wrong_operator_fails(at_work, monkeypatch):
    usual = ops.affine_injector

    def affine_injector(z, h, eps=1e-4, *, inverse=False, backend="auto"):
        y, logdet = usual(z, h, eps, inverse=inverse, backend=backend)
        return y * (1.001 if backend == "native" else 1), logdet

    monkeypatch.setattr(ops, "affine_injector", affine_injector)
    checks.kernels(at_work)
    assert failures(at_work) == {"native, 4 channels"}


def test_an_operator_that_is_another_in_a_graph_or_on_a_stream_fails(at_work, monkeypatch):
    usual, calls = ops.affine_coupling, iter(range(1000))

    def affine_coupling(z, h, eps=1e-4, *, inverse=False, backend="auto"):
        y, logdet = usual(z, h, eps, inverse=inverse, backend=backend)
        return y, logdet + next(calls)

    monkeypatch.setattr(ops, "affine_coupling", affine_coupling)
    monkeypatch.setattr(checks, "_operators_are_right", lambda *arguments: {})
    checks.kernels(at_work)
    assert failures(at_work) == {"native in a captured graph", "native on a second stream"}


@pytest.mark.parametrize("result", [0, 1], ids=["inverse", "logdet"])
def test_a_wrong_inverse_fails(at_work, monkeypatch, result):
    usual = ops.inverse_logdet

    def inverse_logdet(weight, backend):
        found = list(usual(weight, backend=backend))
        found[result] = found[result] + 1e-6
        return tuple(found)

    monkeypatch.setattr(ops, "inverse_logdet", inverse_logdet)
    linear_algebra.linear_algebra(at_work)
    linear_algebra.linear_algebra_captured(at_work)
    assert failures(at_work) == {"ours, native, 3 of 4×4"}


def test_an_engine_that_is_off_fails(at_work, monkeypatch):
    usual = checks.differences
    monkeypatch.setattr(checks, "differences", lambda *tensors: usual(*tensors) | {"images": 1e-3})
    checks.engine(at_work)
    assert failures(at_work) == {"fp32", "fp32, checkpoint=False"}, "less precise ones are allowed as much"


def test_variants_of_a_step_are_measured_without_a_part_of_the_engine(at_work, monkeypatch):
    seen = []
    monkeypatch.setattr(models, "_timed_step", lambda *arguments, **options: seen.append((ablation(), options)) or {})
    models.training_variants(at_work)
    assert seen == [
        (Ablation(), {"precision": "bf16", "checkpoint": False}),
        (Ablation(subpixel=False), {"precision": "bf16"}),
        (Ablation(channels_last=False), {"precision": "bf16"}),
        (Ablation(), {"precision": "bf16"}),
    ]


@pytest.mark.slow
def test_a_replay_that_is_off_fails(at_work, monkeypatch):
    """The parts of `capture` compare steps and samples, each of them moved a little here."""

    class Step(graphs.TrainingStep):
        made = 0

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            Step.made += 1
            self.factor = 1 + 0.1 * Step.made

        def _run(self, *inputs):
            loss, norm = super()._run(*inputs)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.factor
            return loss * self.factor, norm

    class Sampler(graphs.Sampler):
        def _run(self, *inputs):
            images, first_bad = super()._run(*inputs)
            return images * 1.001, first_bad

    monkeypatch.setattr(graphs, "TrainingStep", Step)
    monkeypatch.setattr(graphs, "Sampler", Sampler)
    capture.capture_step(at_work)
    capture.capture_sampler(at_work)
    assert failures(at_work) == {
        "gradients", "steps with Adam", "encoder frozen, then trained", "captured", "frozen", "unfrozen and changed",
        "frozen again",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "text", "[]", '{"item": "kernels"}'])
def test_a_file_of_other_rows_is_named(tmp_path, text):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match="results.jsonl' is no file of results"):
        driver.read_rows(tmp_path / "results.jsonl")


def test_the_summary_says_what_failed_what_was_skipped_and_what_is_slow():
    rows = [
        MACHINE,
        row("ceilings", "copy", gb_per_s=1000.0),
        row("ceilings", "bf16 product", tflop_per_s=100.0),
        row("engine", "fp32", ok=False),
        row("engine", "bf16", ok=False),
        row("engine", ok=False) | {"error": "2 of its parts failed: fp32, bf16"},
        row("kernels", ok=False),
        row("published", "all", ok=None),
        row("training", "bf16, graph", median_s=0.05, p20_s=0.04, p80_s=0.06, first_s=2.0, peak_bytes=2**30),
        row(
            "training-profile", "bf16, eager", kernels=7, launches=6, span_s=0.01, busy_s=0.005, synchronising=0,
            top=[["a_kernel", 3, 2500.0, 0.5]],
        ),
        row("operators", "flow_step", **{f"forward, {b}": {"share_of_copy": 0.25} for b in ("triton", "reference")}),
        row("operators", "step kernel", backend="triton", forward_us=1.0, forward_gb_per_s=900.0),
        row("convolutions", "12→64", forward_us=1.0, forward_tflop_per_s=20.0, weight_tflop_per_s=80.0),
    ]  # fmt: skip
    text = summary.summary(rows)
    assert "## failed\nengine, fp32, engine, bf16, kernels:\n    torn\n    off\n\n##" in text, (
        "an error once; each item or its parts"
    )
    assert "## skipped\npublished, all: torn\noff" in text
    assert "training, bf16, graph: 50 ms (40–60, first 2 s, 1.00 GiB)" in text
    assert "training-profile, bf16, eager: 7 kernels by 6 launches; 5 ms of work in 10 ms" in text
    assert " 50.0%     2.500 ms      3 × a_kernel" in text
    assert " 25.0% flow_step, forward, triton\n… of 1 below 85%, 2 in all" in text
    assert " 20.0% 12→64, forward\n… of 1 below 50%, 2 in all" in text
    assert "reference" not in text and "dry" not in text


def test_a_row_is_flushed_before_the_next_part_begins(tmp_path):
    setup = session.Setup(tmp_path, dry=True)
    at_work = session.Session(setup, "item", float("inf"))
    at_work.part("first", lambda: {"value": 1})
    lines = at_work.part("second", lambda: {"lines": (tmp_path / session.RESULTS).read_text().splitlines()})["lines"]
    assert [json.loads(line)["part"] for line in lines] == ["first"]
