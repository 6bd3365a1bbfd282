"""Provenance of a row: device, processor, versions, commit, date, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

import ncsr_fast


def check_installed() -> None:
    """Raise ValueError if the package that would be measured is not the installed one, which has all its kernels."""
    package, origin, found = Path(ncsr_fast.__file__).resolve().parent, _installed_from(), _distribution()
    installed = found and Path(str(found.locate_file("ncsr_fast"))).resolve()
    if origin.get("dir_info", {}).get("editable"):
        installed = _folder(origin) / "ncsr_fast"
    if package != installed:
        remedy = "run it from another folder" if installed else "`make dev` or `pip install .` installs it"
        raise ValueError(f"the package in {package} is not the installed one, which is what benchmarks measure: {remedy}")


def provenance(device: str | torch.device) -> dict[str, Any]:
    """The fields every row ends with. Raises ValueError if what would be measured is not what is installed."""
    check_installed()
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor()["model name"],
        "cpu": "{model name}, family {cpu family}, model {model}, stepping {stepping}".format_map(_processor()),
        "physical_cores": _physical_cores(),
        "instruction_set": _instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "ncsr_fast": ncsr_fast.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str | None:
    """Commit of the checkout ncsr_fast was installed from, or is imported from, as it is now; None where git cannot tell.

    It ends in "-dirty" when a tracked file other than a stored result has changed. NCSR_FAST_COMMIT names the commit of a
    copy of the tree without its .git.
    """
    if "NCSR_FAST_COMMIT" in os.environ:
        return os.environ["NCSR_FAST_COMMIT"]
    origin = _installed_from()
    if "vcs_info" in origin:  # pip install git+https://…
        return origin["vcs_info"]["commit_id"]
    folder = _folder(origin) or Path(ncsr_fast.__file__).resolve().parent
    if not folder.is_dir() or not _git(folder, "ls-files", "."):  # no checkout, or one that merely contains the environment
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)benchmarks/results")
    return _git(folder, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _installed_from() -> dict[str, Any]:
    """pip's record of where it installed ncsr_fast from (PEP 610)."""
    found = _distribution()
    return json.loads(found.read_text("direct_url.json") or "{}") if found else {}


def _distribution() -> importlib.metadata.Distribution | None:
    """The installation of ncsr_fast, which is not the egg-info that a build leaves in a checkout."""
    found = importlib.metadata.distributions(name="ncsr_fast")
    return next((each for each in found if each.read_text("RECORD") is not None), None)


def _folder(origin: dict[str, Any]) -> Path | None:
    """The checkout that `_installed_from` names, if it is one on this machine."""
    url = urlparse(origin.get("url", ""))
    return Path(url2pathname(url.path)).resolve() if url.scheme == "file" else None


def recorded_command(module: str, arguments: Sequence[str], paths: Mapping[Path | None, str]) -> str:
    """The command line of a row, to be run again elsewhere: without the folder of the rows, and with names for paths.

    Args:
        module: What was run, as in "ncsr_fast.benchmarks.training".
        arguments: Those it was given. Options must be spelled out.
        paths: Values that are paths of this machine, and what stands for them.
    """
    words, left = ["python", "-m", module], list(arguments)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option == "--out":
            left = left if equals else left[1:]
        elif equals:
            words.append(f"{option}={paths.get(Path(value), value)}")
        else:
            words.append(paths.get(Path(option), option))
    return shlex.join(words)


def _git(folder: Path, *arguments: str) -> str:
    """Output of git, empty when there is no git or it fails."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, str]:
    """The fields by which /proc/cpuinfo tells one processor from another; "?" for those that it has not."""
    unknown = {"model name": platform.processor() or "?", "cpu family": "?", "model": "?", "stepping": "?"}
    return unknown | (_cpuinfo() or [{}])[0]


def _physical_cores() -> int | None:
    """Number of cores, hyperthreads not counted; None where /proc/cpuinfo does not tell."""
    cores = {(each.get("physical id"), each.get("core id")) for each in _cpuinfo()}
    return len(cores) if cores and (None, None) not in cores else None


def _cpuinfo() -> list[dict[str, str]]:
    """The fields of each logical processor."""
    info = Path("/proc/cpuinfo")
    blocks = info.read_text(encoding="utf-8").strip().split("\n\n") if info.exists() else []
    return [dict(re.findall(r"^(.*?)[ \t]*:[ \t]*(.*)$", block, flags=re.MULTILINE)) for block in blocks]


def _instruction_set() -> str | None:
    """The one that our compiled module uses; None where there is no such module."""
    try:
        from ncsr_fast import _native
    except ImportError:
        return None
    return _native.instruction_set()
