"""Wheels with CUDA kernels, one for each Python, for machines where nothing is compiled.

    make wheel-gpu

They go to wheels/, which git ignores, with the commit they were built from in wheels/COMMIT. Interpreters are looked for as
python3.10 and so on, and among pyenv's; a line is printed for each. The exit status is 1 if a build fails or if all of them are
too large to be carried, and 2 if none fails but a Python is not here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from matrix import ROOT, Unavailable, interpreter

FOLDER = ROOT / "wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ARCHITECTURES = "8.0;9.0;10.0"  # A100, H100 and H200, B200
_MOST_BYTES = 60 * 2**20  # of all wheels: what is carried to a GPU with them is the checkout


def build(version: str) -> Path:
    """The wheel for a Python. Raises Unavailable where there is no such Python, CalledProcessError where the build fails."""
    command = [interpreter(version), "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(FOLDER), str(ROOT)]
    tag = f"cp{version.replace('.', '')}"
    for stale in (*FOLDER.glob(f"*-{tag}-*.whl"), *(ROOT / "build").glob("lib*")):  # and copies of modules of an earlier time
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    environment = os.environ | {"NCSR_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    with (FOLDER / f"{tag}.log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    (wheel,) = FOLDER.glob(f"*-{tag}-*.whl")
    return wheel


def commit() -> str:
    """The checkout's commit, which ends in "-dirty" when a tracked file has changed."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="VERSION", help=f"of {', '.join(PYTHONS)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.pythons) - {*PYTHONS}:
        parser.error(f"no Python {', '.join(sorted(unknown))}; there are {', '.join(PYTHONS)}")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "COMMIT").write_text(commit() + "\n")
    status = 0
    for version in args.pythons or PYTHONS:
        try:
            wheel = build(version)
        except Unavailable as reason:
            print(f"{version:5} left out: {reason}", flush=True)
            status = status or 2
        except subprocess.CalledProcessError:
            print(f"{version:5} FAILED, see wheels/cp{version.replace('.', '')}.log", flush=True)
            status = 1
        else:
            print(f"{version:5} {wheel.relative_to(ROOT)}, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    size = sum(wheel.stat().st_size for wheel in FOLDER.glob("*.whl"))
    if size > _MOST_BYTES:
        print(f"all wheels together are {size / 2**20:.1f} MiB, more than {_MOST_BYTES // 2**20} MiB: too large to be carried")
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
