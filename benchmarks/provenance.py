"""What a row says of where it was measured: device, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

import ncsr_fast


def provenance(device: str | torch.device) -> dict[str, Any]:
    """The fields every row ends with."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
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
    url = urlparse(origin.get("url", ""))
    folder = Path(url2pathname(url.path)) if url.scheme == "file" else Path(ncsr_fast.__file__).resolve().parent
    if not folder.is_dir() or not _git(folder, "ls-files", "."):  # no checkout, or one that merely contains the environment
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)benchmarks/results")
    return _git(folder, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _installed_from() -> dict[str, Any]:
    """pip's record of where it installed ncsr_fast from (PEP 610)."""
    try:
        return json.loads(importlib.metadata.distribution("ncsr_fast").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return {}


def _git(folder: Path, *arguments: str) -> str:
    """Output of git, empty when there is no git or it fails."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
