"""Build of ncsr_fast: where its packages are, and its compiled module ncsr_fast._native.

C++ is compiled when there is a compiler, CUDA when there is nvcc as well; one line says what was built, what was
skipped and why. NCSR_FAST_CUDA=1 makes skipping CUDA an error, NCSR_FAST_CUDA=0 leaves it out. NVCC, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, CXX, CFLAGS, CXXFLAGS, LDFLAGS and MAX_JOBS mean what they mean elsewhere.
torch has no part in it: the module takes pointers, so one build serves every torch.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

# not -ffast-math, under which there are no NaNs to find
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# cpu/cpu.cpp is compiled once for each, and module.cpp asks the CPU for the same features at import. Features, not levels
# such as x86-64-v3, which compilers before gcc 11 do not know. Linked in this order: a function that several objects
# hold, such as one of the standard library, is taken from the first of them, which asks least of the CPU.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "cd", "bw", "dq", "vl")), "-mprefer-vector-width=512"]
X86 = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # code for 8.0 runs on 8.6 and 8.9 too, and so on
SHARED = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
JOBS = os.environ.get("MAX_JOBS") or os.cpu_count() or 1
NINJA_RULES = """\
rule compile
  command = $compiler -Icsrc -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $compiler $in $libraries -o $out
"""


class Skipped(Exception):
    """Something cannot be built here; the text is the reason."""


def output(command: list[str]) -> str:
    """What a command prints; Skipped with its complaint when it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise Skipped(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        complaint = re.search(".*(error|fatal).*", done.stdout)
        raise Skipped(f"{command[0]}: {complaint[0] if complaint else f'exit status {done.returncode}'}")
    return done.stdout


def probe(compiler: list[str], source: str = "int main() {}") -> str:
    """What a compiler prints about a small program; Skipped when it cannot compile it."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source + "\n", encoding="utf-8")
        return output([*compiler, str(path), "-o", str(path.with_suffix(""))])


def accepts(compiler: list[str], source: str) -> bool:
    try:
        probe(compiler, source)
    except Skipped:
        return False
    return True


def find_compiler() -> list[str]:
    """The command that compiles C++ for this Python."""
    if sys.platform == "win32":
        raise Skipped("Windows is not supported")
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None:
        raise Skipped("there is no C++ compiler (CXX, c++, g++ or clang++)")
    flags = shlex.split(f"{os.environ.get('CFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
    command = [*shlex.split(name), *CXX_FLAGS, *flags, f"-I{sysconfig.get_path('include')}"]
    probe([*command, "-c"], "#include <Python.h>")
    return command


def host_compiler(compiler: list[str], folder: Path) -> str:
    """The compiler as one word, which is what nvcc takes: of CXX="ccache g++ -m64" a script in `folder` that runs all of it."""
    words = compiler[: compiler.index(CXX_FLAGS[0])]
    if len(words) == 1:
        return words[0]
    script = folder.resolve() / "host_compiler"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def architectures(requested: str, supported: list[str]) -> list[str]:
    """The architectures to compile for, as in "9.0" or "9.0+PTX": those requested, else the usual ones nvcc supports."""
    if not requested.strip():
        usual = [arch for arch in ARCHITECTURES if arch in supported]
        # the newest PTX is for chips to come, the oldest for those in between
        return [arch + "+PTX" if arch in (usual[0], usual[-1]) else arch for arch in usual]
    wanted = re.findall(r"[^;\s]+", requested)
    for arch in wanted:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if not match or match[1] not in supported:
            expected = f"this nvcc supports {', '.join(supported)}" if match else "expected as in '8.0;9.0a;12.0+PTX'"
            raise PlatformError(f"TORCH_CUDA_ARCH_LIST={requested!r}: {arch!r} cannot be compiled: {expected}")
    return wanted


def gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX").replace(".", "")
    code = f"sm_{number},compute_{number}" if architecture.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code=[{code}]"


def find_cuda(host: str) -> tuple[list[str], list[str], str]:
    """The command that compiles CUDA, the libraries its objects need, and what it compiles for."""
    wish = os.environ.get("NCSR_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise PlatformError(f"NCSR_FAST_CUDA={wish!r}: expected 1 (required), 0 (left out) or nothing (if nvcc is there)")
    if wish == "0":
        raise Skipped("NCSR_FAST_CUDA=0")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=home and os.path.join(home, "bin"))
    nvcc = shlex.split(os.environ.get("NVCC") or shlex.quote(found or ""))  # as CXX it may have a launcher before it
    if nvcc == [""]:
        raise Skipped(f"there is no nvcc in {'CUDA_HOME' if home else 'PATH'}")
    command = [*nvcc, "-ccbin", os.environ.get("NVCC_CCBIN", host)]
    # nvcc may be a script that lies elsewhere: where its libraries are is what it says when it links
    paths = shlex.split(re.search("LIBRARIES=(.*)", probe([*command, "-v", "-x", "cu"]))[1])
    version = re.search(r"release ([\d.]+)", output([*nvcc, "--version"]))[1]
    supported = re.sub(r"compute_(\d+)(\d)", r"\1.\2", output([*nvcc, "--list-gpu-arch"])).split()
    wanted = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), supported)
    command += [*NVCC_FLAGS, f"--threads={JOBS}", *map(gencode, wanted)]
    return command, [*paths, "-lcudart_static", "-lrt", "-lpthread", "-ldl"], f"{version} for {' '.join(wanted)}"


def skipped(reason: Skipped) -> str:
    if os.environ.get("NCSR_FAST_CUDA") == "1":
        raise PlatformError(f"NCSR_FAST_CUDA=1 asks for CUDA, which cannot be built: {reason}") from reason
    return f"skipped, {reason}"


def plan(module: Path, temp: Path) -> tuple[str, str]:
    """The build.ninja that makes the module, and the line that says what is in it."""
    import pybind11  # here, since the tests import this file and have no need of it

    compiler = find_compiler()
    isas = X86 if accepts([*compiler, *AVX512, "-c"], "#include <immintrin.h>") else {"baseline": []}
    openmp = accepts([*compiler, *SHARED, "-fopenmp"], "#include <omp.h>\nint threads() { return omp_get_max_threads(); }")
    threads = ["-fopenmp"] if openmp else []
    objects = {f"cpu_{isa}": ("cpu/cpu.cpp", [*compiler, *threads, *X86[isa], f"-DNCSR_ISA={isa}"]) for isa in isas}
    try:
        nvcc, libraries, cuda = find_cuda(host_compiler(compiler, temp))
        objects["cuda"] = ("cuda/cuda.cu", nvcc)
    except Skipped as reason:
        libraries, cuda = [], skipped(reason)
    info = f"C++: {', '.join(isas)}, {'OpenMP' if openmp else 'no OpenMP'}; CUDA: {cuda}"
    defines = ["-DNCSR_X86"] * (isas is X86) + ["-DNCSR_CUDA"] * ("cuda" in objects) + [f"-DNCSR_BUILD_INFO={json.dumps(info)}"]
    objects = {"module": ("module.cpp", [*compiler, f"-I{pybind11.get_include()}", *defines]), **objects}

    def quoted(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [f"builddir = {temp}", NINJA_RULES]
    for name, (source, command) in objects.items():
        lines += [f"build {temp}/{name}.o: compile csrc/{source}", f"  compiler = {quoted(command)}"]
    libraries += [*threads, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines += [f"build {module}: link " + " ".join(f"{temp}/{name}.o" for name in objects)]
    lines += [f"  compiler = {quoted([*compiler, *SHARED])}", f"  libraries = {quoted(libraries)}", ""]
    return "\n".join(lines), info


class BuildNative(build_ext):
    """Has ninja compile csrc/: several files at a time, and only what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # its folder of objects is a temporary one; this one is that of the other builds
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extension(self, extension: Extension) -> None:
        module, ninja_file = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp, "build.ninja")
        module.parent.mkdir(parents=True, exist_ok=True)
        ninja_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            text, self.info = plan(module, ninja_file.parent)
        except Skipped as reason:
            self.info = f"C++ and CUDA: {skipped(reason)}; PyTorch and Triton remain"
            module.unlink(missing_ok=True)  # left by an earlier build
            extension.optional = True  # so that setuptools does not miss it
        else:
            ninja_file.write_text(text, encoding="utf-8")
            # without isolation, ninja may be in an environment that is not on PATH
            ninja = shutil.which("ninja") or os.path.join(sysconfig.get_path("scripts"), "ninja")
            if subprocess.run([ninja, "-f", str(ninja_file), f"-j{JOBS}"], check=False).returncode:
                raise CompileError(f"csrc/ does not compile ({self.info}); the compiler's messages are above")
            os.utime(module)  # newer than all of csrc/, files that this build has no use for included: the tests ask for that

    def run(self) -> None:
        super().run()
        folder = "ncsr_fast" if self.inplace else os.path.join(self.build_lib, "ncsr_fast")
        # for `ncsr-fast doctor`, module or no module
        Path(folder, "build_info.txt").write_text(self.info + "\n", encoding="utf-8")
        print(f"ncsr_fast: {self.info}")


if __name__ == "__main__":
    setup(
        packages=find_packages(include=["ncsr_fast", "ncsr_fast.*"])
        + [f"ncsr_fast.{name}" for name in ("kernels", "benchmarks", "benchmarks.gpu")],
        package_dir={"ncsr_fast.kernels": "kernels", "ncsr_fast.benchmarks": "benchmarks"},
        package_data={
            "ncsr_fast": ["models/*/*", "gpus/*.json", "evaluation/*.json", "py.typed"],
            "ncsr_fast.gallery": ["*.html", "*.css", "*.js"],
        },
        ext_modules=[Extension("ncsr_fast._native", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
