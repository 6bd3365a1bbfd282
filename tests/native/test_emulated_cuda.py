"""The CUDA kernels on a machine without a GPU: run block by block on the CPU, and compiled for real chips.

`emulated_cuda.cpp` says what an emulation can and cannot show. On a machine with a GPU the same kernels run in tests/ops.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import installation
import pytest
import torch
from caching import made_once
from layouts import laid_out
from operator_cases import (
    ROUNDING,
    arguments,
    assert_close,
    differentiable,
    directions,
    formula,
    marked,
    operators,
    pairwise,
    run,
)

from ncsr_fast import ops
from ncsr_fast.ops.inverse_logdet import invert

pytestmark = pytest.mark.slow  # a minute of compilation, where pytest's cache does not have it
HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"


def compiled(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def sources_of_cuda() -> list[Path]:
    return [*sorted(path for path in SOURCES.rglob("*") if path.is_file()), HERE / "emulated_cuda.cpp"]


@pytest.fixture(scope="module")
def emulated(pytestconfig):
    """A module like ncsr_fast._native whose CUDA device is the CPU."""
    compiler, pybind11 = shutil.which("g++"), importlib.util.find_spec("pybind11")
    if compiler is None or pybind11 is None or not installation.expects("native"):
        pytest.skip("needs g++, pybind11 and the native backend")
    includes = [f"-I{path}" for path in (SOURCES, sysconfig.get_path("include"), Path(pybind11.origin).parent / "include")]
    common = [compiler, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", *includes]
    defines = ["-DNCSR_CUDA", "-DNCSR_ISA=baseline", '-DNCSR_BUILD_INFO="emulated"']
    files = [SOURCES / "module.cpp", SOURCES / "cpu" / "cpu.cpp", HERE / "emulated_cuda.cpp"]
    library = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compile_module(folder: Path) -> None:
        objects = [str(folder / f"{file.stem}.o") for file in files]
        running = [subprocess.Popen([*common, *defines, "-c", str(file), "-o", obj]) for file, obj in zip(files, objects)]
        assert [process.wait() for process in running] == [0, 0, 0]
        compiled([*common, "-shared", *objects, "-o", str(folder / library)])

    causes = [*sources_of_cuda(), *common, *defines, compiled([compiler, "--version"])]
    folder = made_once(pytestconfig, "emulated_cuda", causes, compile_module)
    spec = importlib.util.spec_from_file_location("_native", folder / library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_the_emulation(emulated, monkeypatch):
    """Has backend="native" run the CUDA kernels on CPU tensors."""
    from ncsr_fast.ops import native as calls
    from ncsr_fast.ops import passing

    def run_emulated(call, x, workspace, *rest):
        memory = torch.full((workspace(),), 255, dtype=torch.uint8)  # NaN, as garbage of a GPU may be
        return call(*rest, x.dtype == torch.float64, (1, 0, 0, memory.data_ptr()))

    monkeypatch.setattr(calls, "native", emulated)
    monkeypatch.setattr(passing, "_launch", run_emulated)


LAYOUTS, DTYPES = ["contiguous", "channels_last", "sliced"], [torch.float64, torch.float32, torch.bfloat16]
IN_EVERY_RUN = pairwise([False, True], LAYOUTS, DTYPES)


@operators
@directions
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@marked("exhaustive", lambda inverse, layout, dtype: (inverse, layout, dtype) not in IN_EVERY_RUN)
def test_emulated_kernels(on_the_emulation, name, inverse, layout, dtype):
    """Values, log-det and gradients; sizes that leave remainders of every tile, and channels of both paths."""
    for channels, size in ((5, (7, 11)), (12, (9, 8))):
        tensors = [laid_out(tensor, layout) for tensor in differentiable(arguments(name, channels, size=size, dtype=dtype))]
        doubles = differentiable([tensor.double() for tensor in tensors])
        y, logdet = run(name, *tensors, inverse=inverse, backend="native")
        expected, expected_logdet = formula(name, *doubles, inverse=inverse)
        assert_close(y, expected, ROUNDING[dtype], "y")
        assert_close(
            logdet, expected_logdet, 20 * ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32], "logdet"
        )
        grads = torch.autograd.grad(y.sin().sum() + logdet.sum(), tensors)
        references = torch.autograd.grad(expected.sin().sum() + expected_logdet.sum(), doubles)
        for grad, reference in zip(grads, references):
            assert_close(grad, reference, 20 * ROUNDING[dtype], "gradient")


@pytest.mark.parametrize("channels", [1, 24, 48, 96, 192])
def test_emulated_channels(on_the_emulation, channels):
    tensors = differentiable(arguments("flow_step", channels, size=(3, 7), dtype=torch.float32))
    doubles = differentiable([tensor.double() for tensor in tensors])
    y, logdet = run("flow_step", *tensors, backend="native")
    expected, expected_logdet = formula("flow_step", *doubles)
    assert_close(y, expected, ROUNDING[torch.float32], "y")
    grads = torch.autograd.grad(y.sum() + logdet.sum(), tensors)
    for grad, reference in zip(grads, torch.autograd.grad(expected.sum() + expected_logdet.sum(), doubles)):
        assert_close(grad, reference, 20 * ROUNDING[torch.float32], "gradient")


@pytest.mark.parametrize("channels", [1, 5, 12])
def test_emulated_elimination(on_the_emulation, channels):
    """Matrices whose rows are exchanged, one that is singular, one with NaN, and none at all."""
    weight = torch.randn(4, channels, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[1, :, channels // 2] = 0
    weight[2, channels // 2, 0] = torch.nan
    inverse, logdet = invert(weight, "weight", needs_inverse=False, backend="native")
    for index in (0, 3):
        assert_close(inverse[index], torch.linalg.inv(weight[index]), 1e-11, "inverse")
        assert_close(logdet[index], torch.linalg.slogdet(weight[index])[1], 1e-12, "log|det|")
    assert logdet[1] == -torch.inf and not inverse[1].isfinite().any()
    assert logdet[2].isnan() and inverse[2].isnan().any()
    with pytest.raises(ValueError, match="matrix 1: weight is singular"):
        ops.inverse_logdet(weight, backend="native")
    assert ops.inverse_logdet(weight[:0], backend="native")[0].shape == (0, channels, channels)


@pytest.mark.parametrize("size, batch", [((2, 2), 0), ((0, 3), 2), ((1, 1), 1)], ids=str)
def test_emulated_empty(on_the_emulation, size, batch):
    tensors = differentiable(arguments("flow_step", 6, size=size, batch=batch, dtype=torch.float32))
    y, logdet = run("flow_step", *tensors, backend="native")
    assert y.shape == tensors[0].shape and logdet.isfinite().all()
    for grad in torch.autograd.grad(y.sum() + logdet.sum(), tensors):
        assert grad.isfinite().all()


def test_the_device_of_a_launch(on_the_emulation, emulated, monkeypatch):
    """The ordinal of the call decides it, whichever device is current; one that is not there raises with CUDA's message."""
    from ncsr_fast.ops import native as calls
    from ncsr_fast.ops import passing

    x, h = arguments("affine_injector", 4, dtype=torch.float32)
    memory = torch.empty(4096, dtype=torch.uint8)
    library = ctypes.CDLL(emulated.__file__)

    def launch_on(ordinal: int) -> None:
        where = (1, ordinal, 0, memory.data_ptr())
        monkeypatch.setattr(passing, "_launch", lambda call, x, workspace, *values: call(*values, False, where))
        calls.affine_forward(x, h, 0, 1e-4, False)

    for ordinal in (1, 0, 0, 1):
        launch_on(ordinal)
        assert library.emulated_device() == ordinal
    with pytest.raises(RuntimeError, match="ncsr_fast: CUDA: invalid device ordinal"):
        launch_on(2)


@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.exhaustive), "90"])
def test_cuda_kernels_do_not_spill(architecture, pytestconfig, compiler_report):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", f"-arch=sm_{architecture}", f"-I{SOURCES}"]

    def compile_kernels(folder: Path) -> None:
        text = compiled([nvcc, *flags, "-c", str(SOURCES / "cuda" / "cuda.cu"), "-o", str(folder / "cuda.o")])
        (folder / "said.txt").write_text(text)

    causes = [*sources_of_cuda(), *flags, compiled([nvcc, "--version"])]
    text = (made_once(pytestconfig, f"spills-{architecture}", causes, compile_kernels) / "said.txt").read_text()
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
        text, flags=re.DOTALL,
    )  # fmt: skip
    assert len(kernels) > 40
    for name, stores, loads, registers, rest in kernels:
        kernel = re.search(r"[a-z_]+_kernel", name)[0]
        channels = re.search(r"_kernelILi(\d+)E", name)
        shared = re.search(r"(\d+) bytes smem", rest)
        compiler_report.append(
            f"CUDA sm_{architecture} {kernel:<28} C={channels[1] if channels else '-':<4} {registers:>3} registers, "
            f"{shared[1] if shared else 0} bytes of shared memory, {stores} + {loads} bytes spilled"
        )
        assert (int(stores), int(loads)) == (0, 0), name
