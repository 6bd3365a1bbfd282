"""The benchmark harness: the shapes it measures, the check that gates it, what it stores and shows. No test is about time."""

from __future__ import annotations

import functools
import inspect
import json

import installation
import pytest
import torch
from operator_cases import marked

from ncsr_fast import ops
from ncsr_fast.benchmarks import harness, registry, report, run
from ncsr_fast.cli.main import main

FIELDS = [
    "operator", "backend", "direction", "shape", "dtype", "layout", "used_by", "gradients_recorded", "median_ms", "p20_ms",
    "p80_ms", "rounds", "bytes", "gb_per_s", "share_of_copy", "peak_bytes", "device", "cpu", "physical_cores",
    "instruction_set", "torch_instruction_set", "threads", "torch", "triton", "cuda", "ncsr_fast", "commit", "date", "command",
]  # fmt: skip


def bench(folder, *arguments: str) -> int:
    return main(["bench", "--quick", "--device", "cpu", "--out", str(folder), *arguments])


def stored(folder) -> list[dict]:
    return json.loads((folder / "operators-cpu-quick.json").read_text())


@pytest.mark.parametrize(
    "name, sizes",
    {
        "x4-train": [(18, 12, 80, 80), (18, 24, 40, 40), (18, 96, 20, 20)],
        "x8-train": [(18, 12, 80, 80), (18, 24, 40, 40), (18, 48, 20, 20), (18, 192, 10, 10)],
        "sample": [(1, 12, 80, 80), (1, 24, 40, 40), (1, 96, 20, 20)],
        "large": [(1, 12, 320, 320), (1, 24, 160, 160), (1, 96, 80, 80)],
        "div2k": [(1, 12, 680, 1020), (1, 24, 340, 510), (1, 96, 170, 255)],
    }.items(),
)
def test_shapes_of_the_real_models(name, sizes):
    assert [shape.size for shape in registry.level_shapes(name)] == sizes


def test_splits_are_where_the_models_have_them():
    shapes = registry.OPERATORS["gaussian_split"].shapes(["x4-train", "x8-train"])
    assert [(shape.size[1], shape.split, shape.used_by) for shape in shapes] == [
        (12, 6, ("x4-train level 1", "x8-train level 1")),
        (24, 12, ("x8-train level 2",)),
    ]


def test_every_operator_has_an_entry():
    """Of all that have a backend to choose."""
    functions = [getattr(ops, name) for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
    operators = {each.__name__ for each in functions if "backend" in inspect.signature(each).parameters}
    assert set(registry.functions()) == operators - {"resolve_backend"}
    assert set(ops.OPERATORS) <= set(registry.OPERATORS)


@pytest.mark.parametrize(
    "entry, use, sizes",
    [
        ("conv3x3 64→64", "x4-train", [(18, 64, 40, 40)]),
        ("conv3x3 64→64 upsample2x", "sample", [(1, 64, 40, 40)]),
        ("conv3x3 320→64", "x8-train", [(18, 320, 20, 20)]),
        ("step_network", "x4-train", [(18, 12, 80, 80), (18, 24, 40, 40), (18, 96, 20, 20)]),
        ("fold", "x4-train", [(18, 12, 12), (18, 24, 24), (18, 96, 96)]),
        ("inverse_logdet", "sample", [(18, 12, 12), (18, 24, 24), (18, 96, 96)]),
    ],
)
def test_shapes_of_networks_and_foldings(entry, use, sizes):
    shapes = registry.OPERATORS[entry].shapes([use])
    assert [shape.size for shape in shapes] == sizes
    assert {shape.training for shape in shapes} == {"train" in use}


def test_a_network_in_a_model():
    """64 hidden channels; a coupling reads the pass-through channels and writes a pair for each of the others."""
    for channels, (half, outputs) in {12: (6, 12), 96: (48, 96)}.items():
        shape = registry.Shape((2, channels, 4, 5), 0, False, ())
        inputs = registry.OPERATORS["step_network"].inputs(registry.Draw(shape, "mixed", "channels-last", "cpu"))
        assert inputs["z1"].shape == (2, half, 4, 5) and inputs["z1"].dtype == torch.float32
        assert inputs["pre"].shape == (2, 64, 4, 5) and inputs["pre"].dtype == torch.bfloat16
        assert inputs["w1"].shape == (64, half, 3, 3) and inputs["w3"].shape == (outputs, 64, 3, 3)


def test_bytes_that_must_move():
    shape = registry.level_shapes("quick")[0]  # (2, 12, 8, 8)
    image, pixels = 4 * 2 * 12 * 8 * 8, 2 * 8 * 8
    draw = registry.Draw(shape, "float32", "NCHW", "cpu")
    entry = registry.OPERATORS["affine_coupling"]
    inputs, outputs = entry.inputs(draw), draw.cotangents()
    h, logdet = 4 * 12 * pixels, 4 * 2
    assert entry.bytes_moved(inputs, outputs, shape, backward=False) == image + h + image + logdet
    # dy, dlogdet, the changed half of z, h; dz, dh
    assert entry.bytes_moved(inputs, outputs, shape, backward=True) == image + logdet + image // 2 + h + image + h


@pytest.mark.slow
def test_a_row_has_every_field(tmp_path, capsys):
    assert bench(tmp_path, "--threads", str(torch.get_num_threads())) == 0
    rows = stored(tmp_path)
    assert all(list(row) == FIELDS for row in rows)
    assert {row["operator"] for row in rows} == set(registry.OPERATORS)
    assert {row["direction"] for row in rows} == {"forward", "inverse", "backward", "inverse-backward"}
    assert {row["layout"] for row in rows} == {"NCHW", "channels-last"}
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)
    assert all(row["gb_per_s"] > 0 and row["share_of_copy"] > 0 and row["rounds"] == 3 for row in rows)
    # the result itself is part of the peak
    assert all(row["peak_bytes"] >= result_bytes(row) for row in rows)
    output = capsys.readouterr().out
    assert all(name in output for name in (*registry.OPERATORS, rows[0]["device"]))
    assert main(["bench", "--table", str(tmp_path / "operators-cpu-quick.json")]) == 0
    assert capsys.readouterr().out.strip() in output


def result_bytes(row: dict) -> int:
    """Of the first output, or of the gradient of the first tensor, float32 all of them but the matrices that are outputs."""
    shape = registry.Shape(tuple(row["shape"]), 6, row["gradients_recorded"], ())
    inputs, cotangents = harness.Case(row["operator"], False, shape, row["dtype"], row["layout"], "cpu").draw()
    return (next(iter(inputs.values())) if row["direction"].endswith("backward") else cotangents[0]).nbytes


def test_an_operator_is_chosen_by_its_function(tmp_path):
    """All its entries, on the backends that have it: no Triton, and the compiled module in float32 alone."""
    common = ["--layout", "channels-last", "--directions", "forward", "--no-compile", "--dtype", "float32", "mixed"]
    assert bench(tmp_path, "--operators", "conv3x3", "fold", *common) == 0
    found = {(row["operator"], row["dtype"], row["backend"]) for row in stored(tmp_path)}
    convolutions = [name for name in registry.OPERATORS if name.startswith("conv3x3")]
    assert len(convolutions) == 3
    expected = {(name, dtype, "reference") for name in convolutions for dtype in ("float32", "mixed")}
    expected |= {("fold", "float32", "reference")}
    if installation.expects("native"):
        expected |= {(name, "float32", "native") for name in (*convolutions, "fold")}
    assert found == expected


@pytest.mark.slow
def test_the_compiled_reference_is_a_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no compiler needed
    only = ["--operators", "affine_coupling", "--layout", "NCHW", "--directions", "forward", "backward"]
    assert bench(tmp_path, *only, "--compile-shapes", "quick") == 0
    backends = [row["backend"] for row in stored(tmp_path)]
    assert backends.count("torch.compile") == backends.count("reference") == 3 * 2


def stand_in(monkeypatch, spoil) -> None:
    """A "native" affine_coupling: the reference, its results and its input's gradient passed through `spoil`."""

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, dz):
            return spoil("dz", dz)

    def affine_coupling(z, h, eps=1e-4, *, inverse=False, backend="auto"):
        if backend == "reference":
            return reference(z, h, eps, inverse=inverse, backend=backend)
        y, logdet = reference(Spoiled.apply(z), h, eps, inverse=inverse, backend="reference")
        return spoil("y", y), spoil("logdet", logdet)

    reference = ops.affine_coupling
    available = {name: ops.Backend(name, True, "a stand-in") for name in ("reference", "native")}
    monkeypatch.setattr(ops, "affine_coupling", affine_coupling)
    monkeypatch.setattr(ops, "backends", lambda device, dtype: available)
    monkeypatch.setattr(ops, "resolve_backend", lambda operator, backend, like: backend)


@marked("slow", lambda what, value: (what, value) not in (("y", 1e-3), ("dz", 1e-3)))
@pytest.mark.parametrize("what, message", [("y", "y is wrong"), ("logdet", "logdet is wrong"), ("dz", "the gradient of z")])
@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_what_is_wrong_has_no_figure_and_the_others_have(what, message, value, tmp_path, monkeypatch, capsys):
    def spoil(name, tensor):
        return tensor.index_add(0, torch.tensor([1]), torch.full_like(tensor[:1], value)) if name == what else tensor

    stand_in(monkeypatch, spoil)
    assert bench(tmp_path, "--operators", "affine_coupling", "--layout", "channels-last") == 1
    out, err = capsys.readouterr()
    rows = stored(tmp_path)
    failed, measured = [row for row in rows if "error" in row], [row for row in rows if "error" not in row]
    assert {row["backend"] for row in measured} == {"reference"} and all(row["median_ms"] > 0 for row in measured)
    assert {row["direction"] for row in measured} == {"forward", "inverse", "backward", "inverse-backward"}
    assert failed and {row["backend"] for row in failed} == {"native"}
    assert all("median_ms" not in row and message in row["error"] and row["command"] for row in failed)
    assert "have no figure" in err and f"native: {message}" in err and "2×12×8×8 channels-last float32" in err
    assert f"native: {message}" in out, "the table has them too"
    assert main(["bench", "--table", str(tmp_path / "operators-cpu-quick.json")]) == 0
    assert capsys.readouterr().out.strip() in out


def test_an_arm_that_raises_is_a_row(tmp_path, monkeypatch, capsys):
    def spoil(name, tensor):
        raise RuntimeError("out of luck\nand more")

    stand_in(monkeypatch, spoil)
    only = ["--layout", "NCHW", "--directions", "forward"]
    assert bench(tmp_path, "--operators", "affine_coupling", "affine_injector", *only) == 1
    rows = stored(tmp_path)
    assert {row["error"].partition(", native: ")[2] for row in rows if "error" in row} == {"RuntimeError: out of luck"}
    assert {row["operator"] for row in rows if "error" not in row} == {"affine_coupling", "affine_injector"}
    assert "and more" not in capsys.readouterr().err


def test_a_case_that_cannot_be_timed_is_a_row(tmp_path, monkeypatch, capsys):
    real = run.measure

    def measure(case, *arguments):
        if case.inverse:
            raise MemoryError("too large")
        return real(case, *arguments)

    monkeypatch.setattr(run, "measure", measure)
    assert bench(tmp_path, "--operators", "affine_coupling", "--layout", "NCHW", "--backends", "native") == 1
    failed = {(row["direction"], row["backend"]): "error" in row for row in stored(tmp_path)}
    assert failed == {
        (way, backend): way.startswith("inverse")
        for way in ("forward", "backward", "inverse", "inverse-backward")
        for backend in ("native", "reference")
    }
    assert "MemoryError: too large" in capsys.readouterr().err


def test_an_arm_that_breaks_while_it_is_timed_is_a_row(monkeypatch):
    def broken(**inputs):
        raise RuntimeError("torn")

    case = harness.Case("affine_coupling", False, registry.level_shapes("quick")[0], "float32", "NCHW", "cpu")
    functions = {"native": broken, "reference": case.function("reference")}
    rows = harness.measure(case, functions, ["forward", "backward"], 0.0, 1)
    assert [(row["backend"], row["direction"], row.get("error")) for row in rows] == [
        (backend, way, "RuntimeError: torn" if backend == "native" else None)
        for way in ("forward", "backward")
        for backend in ("native", "reference")
    ]


@pytest.mark.slow
def test_a_right_stand_in_is_measured_beside_the_reference(tmp_path, monkeypatch):
    stand_in(monkeypatch, lambda name, tensor: tensor)
    assert bench(tmp_path, "--operators", "affine_coupling", "--layout", "NCHW", "--dtype", "bfloat16", "mixed") == 0
    assert {row["backend"] for row in stored(tmp_path)} == {"native", "reference"}


def row(backend: str, milliseconds: float, direction: str = "forward") -> dict:
    values = {**dict.fromkeys(FIELDS, 1), "layout": "NCHW", "dtype": "float32"}
    times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), milliseconds)
    return {**values, **times, "operator": "affine_coupling", "backend": backend, "direction": direction, "shape": [1, 2, 3, 4]}


@pytest.mark.parametrize("content", ["", "text", "[1]", '{"a": 1}', '[{"operator": "flow_step"}]'])
def test_a_file_of_other_rows_is_named(tmp_path, capsys, content):
    (tmp_path / "other.json").write_text(content)
    for arguments in (["--table", "other.json"], ["--plot", "other.json", "plot.png"]):
        assert main(["bench", *(str(tmp_path / word) if word[0] != "-" else word for word in arguments)]) == 1
        assert "other.json' is no file of rows that `ncsr-fast bench` wrote: " in capsys.readouterr().err


def test_table_marks_what_loses():
    arms = {"reference": 4.0, "torch.compile": 1.0}
    rows = [row(name, time, direction) for name, time in arms.items() for direction in ("forward", "inverse")]
    lines = report.table([row("native", 2.0), row("native", 0.5, "inverse"), *rows]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    head, losing, winning = cells[0], *cells[2:]
    assert [dict(zip(head, losing))[name] for name in ("× eager", "× compile", "slower than")] == ["2.00", "0.50", "compile"]
    assert [dict(zip(head, winning))[name] for name in ("× eager", "× compile", "slower than")] == ["8.00", "2.00", ""]


@pytest.mark.slow
def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("native", 2.0), row("reference", 1.0), row("torch.compile", 3.0)]
    (tmp_path / "rows.json").write_text(report.to_json(rows))
    assert main(["bench", "--plot", str(tmp_path / "rows.json"), str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--operators", "glow"], "no operator 'glow'; there are actnorm_invconv, "),
        (["--shapes", "x2"], "no shape 'x2'; there are x4-train, "),
        (["--shapes", "sample", "--directions", "backward"], "nothing to measure: "),
        (["--backends", "cuda"], "no backend 'cuda'; there are reference, "),
    ],
)
def test_failures_are_one_line(arguments, message, tmp_path, capsys):
    assert bench(tmp_path, *arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ncsr-fast bench: {message}") and err.count("\n") == 1
