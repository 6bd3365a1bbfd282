"""What an installation holds, and how setup.py decides what to compile."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from setuptools import Distribution, Extension

import ncsr_fast

SETUP = Path(__file__).parents[1] / "setup.py"
PACKAGE = Path(ncsr_fast.__file__).parent


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, on a machine whose PATH holds no program and whose environment asks for nothing."""
    spec = importlib.util.spec_from_file_location("ncsr_fast_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CXX", "CFLAGS", "CXXFLAGS", "NVCC", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "NCSR_FAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    return module


def test_one_name_reaches_site_packages():
    # the record of the installation, not of an egg-info in the working directory
    records = (found.read_text("RECORD") for found in importlib.metadata.distributions(name="ncsr_fast"))
    names = {line.split("/")[0] for line in next(filter(None, records)).splitlines()}
    own = re.compile(r"ncsr_fast|ncsr_fast-.*\.dist-info|\.\.|__editable__.*|__pycache__")  # ..: the command in bin
    assert not [name for name in names if not own.fullmatch(name)]


def test_every_part_is_installed():
    for name in ("kernels", "benchmarks", "benchmarks.gpu"):
        assert importlib.util.find_spec(f"ncsr_fast.{name}").origin, name
    for name in ("ncsr-compact-x4", "llflow-compact"):
        assert (PACKAGE / "models" / name / "model.safetensors").is_file(), name
    assert (PACKAGE / "gpus" / "default.json").is_file()  # without it no backend but the reference runs on a GPU
    for name in ("page.html", "image.html", "page.css", "page.js"):
        assert (PACKAGE / "gallery" / name).is_file(), name
    assert (PACKAGE / "py.typed").is_file()  # type checkers take the hints of the package for true


def test_the_compiled_module_needs_neither_torch_nor_a_gpu():
    info = (PACKAGE / "build_info.txt").read_text().strip()
    spec = importlib.util.find_spec("ncsr_fast._native")
    if info.startswith("C++ and CUDA: skipped, "):
        assert spec is None
        pytest.skip(info)
    code = f"""
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("ncsr_fast._native", {spec.origin!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert "torch" not in sys.modules
# the CUDA runtime in it is its own: another one in the process neither sees it nor is seen by it
assert not hasattr(ctypes.CDLL({spec.origin!r}), "cudaMalloc")
print(native.build_info)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == info


SUPPORTED = ["7.5", "8.0", "8.6", "9.0", "12.0", "10.0"]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        (" 8.6 9.0a;", ["8.6", "9.0a"]),
        ("", ["8.0+PTX", "9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_architectures(build, requested, expected):
    assert build.architectures(requested, SUPPORTED) == expected


def test_an_older_nvcc_compiles_what_it_knows(build):
    assert build.architectures("", ["7.5", "8.0", "9.0"]) == ["8.0+PTX", "9.0+PTX"]


@pytest.mark.parametrize(
    ("requested", "complaint"),
    [("8.0;Ampere", "'Ampere'.*expected as in"), ("80", "'80'.*expected as in"), ("7.0", "'7.0'.*supports 7.5, 8.0")],
)
def test_architectures_that_are_none(build, requested, complaint):
    with pytest.raises(build.PlatformError, match=f"TORCH_CUDA_ARCH_LIST.*{complaint}"):
        build.architectures(requested, SUPPORTED)


@pytest.mark.parametrize(
    ("architecture", "code"),
    [
        ("8.0", "arch=compute_80,code=[sm_80]"),
        ("9.0a", "arch=compute_90a,code=[sm_90a]"),
        ("12.0+PTX", "arch=compute_120,code=[sm_120,compute_120]"),
    ],
)
def test_gencode(build, architecture, code):
    assert build.gencode(architecture) == f"-gencode={code}"


def test_without_nvcc(build, monkeypatch):
    with pytest.raises(build.Skipped, match="no nvcc in PATH"):
        build.find_cuda("c++")
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(build.Skipped, match="/nowhere/nvcc: No such file"):
        build.find_cuda("c++")


def test_cuda_left_out(build, monkeypatch):
    monkeypatch.setenv("NCSR_FAST_CUDA", "0")
    monkeypatch.setenv("NVCC", sys.executable)  # what would be found is not asked for
    with pytest.raises(build.Skipped, match="NCSR_FAST_CUDA=0"):
        build.find_cuda("c++")
    assert build.skipped(build.Skipped("a reason")) == "skipped, a reason"


def test_cuda_asked_for(build, monkeypatch):
    monkeypatch.setenv("NCSR_FAST_CUDA", "1")
    with pytest.raises(build.PlatformError, match="NCSR_FAST_CUDA=1.*a reason"):
        build.skipped(build.Skipped("a reason"))
    monkeypatch.setenv("NCSR_FAST_CUDA", "yes")
    with pytest.raises(build.PlatformError, match="NCSR_FAST_CUDA='yes'"):
        build.find_cuda("c++")


def test_without_a_compiler(build, monkeypatch):
    with pytest.raises(build.Skipped, match="no C\\+\\+ compiler"):
        build.find_compiler()
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(build.Skipped, match="/nowhere/g\\+\\+: No such file"):
        build.find_compiler()
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(\"fatal: no Python.h\")'")
    with pytest.raises(build.Skipped, match="fatal: no Python.h"):
        build.find_compiler()


@pytest.mark.parametrize("words", [["ccache", "g++"], ["env", "X=a b", "g++"], ["g++", "-m64"]], ids=" ".join)
def test_nvcc_is_given_the_whole_compiler(build, monkeypatch, tmp_path, words):
    """It takes one word: of a compiler with a launcher before it or options behind, a script that runs them all."""
    program = tmp_path / words[0]
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    given = []
    monkeypatch.setattr(build, "find_compiler", lambda: [str(program), *words[1:], *build.CXX_FLAGS])
    monkeypatch.setattr(build, "accepts", lambda *arguments: False)
    monkeypatch.setattr(build, "find_cuda", lambda host: given.append(host) or ([], [], "yes"))
    assert build.plan(tmp_path / "module.so", tmp_path)[1].endswith("CUDA: yes")
    (host,) = given
    said = subprocess.run([host, "-c", "it's.cpp"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [*words[1:], "-c", "it's.cpp"]


def test_nvcc_is_given_a_compiler_of_one_word_as_it_is(build, tmp_path):
    assert build.host_compiler(["g++", *build.CXX_FLAGS], tmp_path) == "g++" and not list(tmp_path.iterdir())


def test_nvcc_may_have_a_launcher(build, monkeypatch, tmp_path):
    """As CXX may; both are read as a shell would."""
    nvcc = tmp_path / "nv cc"
    nvcc.write_text("""#!/bin/sh
case "$*" in
    --version) echo "release 12.4" ;;
    --list-gpu-arch) echo compute_90 ;;
    *) echo "LIBRARIES=-L/nowhere" ;;
esac
""")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", f"/usr/bin/env '{nvcc}'")
    command, libraries, said = build.find_cuda("g++")
    assert command[:4] == ["/usr/bin/env", str(nvcc), "-ccbin", "g++"] and said == "12.4 for 9.0+PTX"


def test_a_module_that_is_up_to_date_is_newer_than_its_sources(build, monkeypatch, tmp_path):
    """After a change in a file that this build does not compile, as in CUDA's where there is no nvcc, the tests run again."""
    module = tmp_path / "_native.so"
    module.touch()
    os.utime(module, (0, 0))
    text = f"builddir = {tmp_path}\nrule nothing\n  command = :\nbuild {module}: nothing\n"
    monkeypatch.setattr(build, "plan", lambda module, temp: (text, "C++"))
    command = build.BuildNative(Distribution())
    command.build_temp, command.get_ext_fullpath = str(tmp_path), lambda name: str(module)
    before = time.time() - 1  # a file system may round
    command.build_extension(Extension("ncsr_fast._native", sources=[]))
    assert module.stat().st_mtime > before
