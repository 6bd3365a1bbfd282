"""`ncsr-fast doctor`: show what this machine has, which backend each operator uses, and why others are not available."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys

import torch

from ncsr_fast.cli._common import why_no_cuda

HELP = "show what this machine has and which backend each operator uses"
EXAMPLE = """\
example:
  ncsr-fast doctor"""

_PACKAGES = {
    "numpy": "",
    "pillow": "",
    "safetensors": "",
    "tqdm": "",
    "triton": "for the Triton kernels; CUDA builds of PyTorch include it",
    "scikit-image": "for `demo` and SSIM: pip install 'ncsr_fast[eval]'",
    "lpips": "for LPIPS: pip install 'ncsr_fast[eval]'",
    "pyyaml": "for `train`: pip install 'ncsr_fast[train]'",
    "pydantic": "for `train`: pip install 'ncsr_fast[train]'",
    "tensorboard": "for `train --tensorboard`: pip install 'ncsr_fast[train]'",
    "matplotlib": "for plots of a run: pip install 'ncsr_fast[train]'",
    "huggingface-hub": "for models from the Hugging Face Hub: pip install 'ncsr_fast[hub]'",
    "onnx": "for `export`: pip install 'ncsr_fast[export]'",
    "onnxscript": "for `export`: pip install 'ncsr_fast[export]'",
    "onnxruntime": "for the check of `export`: pip install 'ncsr_fast[export]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # no options


def run(args: argparse.Namespace) -> None:
    del args
    for title, lines in report().items():
        print(title)
        for name, value in lines.items():
            print(f"  {name:<22}{value}")


def report() -> dict[str, dict[str, str]]:
    """The sections that `doctor` prints, each with names and values."""
    from ncsr_fast import __version__, files, ops

    return {
        "ncsr_fast": {
            "version": __version__,
            "installed in": f"{os.path.dirname(files.__file__)} ({_installation()})",
            "shipped models": ", ".join(files.shipped()) or "none",
        },
        "machine": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": f"{platform.system()} {platform.machine()}, glibc {platform.libc_ver()[1] or 'unknown'}",
            "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "torch": f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"),
            "gpu": _gpus(),
            "C++ compiler": _tool("c++", "g++", "clang++"),
            "nvcc": _tool("nvcc"),
        },
        "packages": {name: _package(name, purpose) for name, purpose in _PACKAGES.items()},
        "operators (backend='auto')": {name: _choice(name) for name in _operators()},
        "tables of GPUs": _tables(),
        "backends": {
            backend.name: ("available: " if backend.available else "not available: ") + backend.reason
            for backend in ops.backends().values()
        },
    }


def _operators() -> list[str]:
    """Names of the maps of the state, and of the other operators that have a kernel of their own."""
    from ncsr_fast import ops
    from ncsr_fast.ops.backend import COVERAGE, kernel_of

    return [*ops.OPERATORS, *(kernel for kernel in COVERAGE["native"] if kernel not in map(kernel_of, ops.OPERATORS))]


def _choice(operator: str) -> str:
    """The backend of an operator; on a GPU for float32 and bfloat16 tensors, with the reason."""
    from ncsr_fast import ops, tuning
    from ncsr_fast.ops.backend import kernel_of

    if not torch.cuda.is_available():
        return ops.resolve_backend(operator)
    found: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        like, name = torch.empty(0, dtype=dtype, device="cuda"), str(dtype).removeprefix("torch.")
        try:
            backend = ops.resolve_backend(operator, like=like)
        except tuning.TuningMissing as error:
            backend = f"an error ({error})"
        entries = [tuning.described(*entry) for entry in tuning.choices(kernel_of(operator), name)]
        found.setdefault("; ".join((backend, *(entries or ["no table has an entry"]))), []).append(name)
    return " | ".join(f"{' and '.join(names)}: {line}" for line, names in found.items())


def _tables() -> dict[str, str]:
    """The files of the tables of GPUs, and the mode in which they are read."""
    from ncsr_fast import tuning

    mine = os.environ.get(tuning.USERS) or tuning.user_folder()
    return {
        "mode": f"{tuning.mode()} ({tuning.MODE})",
        "the package's": ", ".join(file.name for file in sorted(tuning.PACKAGED.glob("*.json"))),
        "the user's": f"{mine} ({'exists' if os.path.exists(mine) else 'does not exist: `ncsr-fast tune` writes it'})",
    }


def _installation() -> str:
    """A description of how the package was installed."""
    try:
        origin = importlib.metadata.distribution("ncsr_fast").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return "a source tree that was not installed; run there: pip install -e ."
    editable = json.loads(origin).get("dir_info", {}).get("editable")
    return "editable: after an edit of csrc/, install it again" if editable else "installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none: {why_no_cuda()}"
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in names)


def _tool(*names: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path:
            try:
                done = subprocess.run([path, "--version"], capture_output=True, timeout=30, check=False)
            except (OSError, subprocess.SubprocessError) as error:
                return f"{path} cannot be run: {error}"
            output = done.stdout.decode(errors="replace")
            lines = [line for line in output.splitlines() if "release" in line] or output.splitlines()[:1]
            return f"{lines[0].strip() if lines else 'version unknown'} ({path})"
    return f"none ({' or '.join(names)} not found)"


def _package(name: str, purpose: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" + (f" ({purpose})" if purpose else "")
