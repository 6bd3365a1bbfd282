"""Wheels, one for each Python, for machines where nothing is compiled.

    make wheels       in dist/, with C++ alone; each is installed in a new environment without a compiler, and draws a sample
    make wheel-gpu    in wheels/, with CUDA kernels as well

Git ignores both folders; COMMIT in them is the commit that the wheels were built from. Interpreters are looked for as
python3.10 and so on, and among pyenv's; a line is printed for each. The exit status is 1 if a build or a trial fails or if all
wheels with CUDA kernels are too large to be carried, and 2 if none fails but a Python is not here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matrix import ROOT, Unavailable, interpreter

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ARCHITECTURES = "8.0;9.0;10.0"  # A100, H100 and H200, B200
_MOST_BYTES = 60 * 2**20  # of all wheels with CUDA kernels: what is carried to a GPU with them is the checkout
_TRIAL = """\
import torch
from ncsr_fast import NCSR, ops

assert ops.backends()["native"].available, ops.backends()["native"].reason
model = NCSR.from_pretrained("ncsr-compact-x4")
with torch.no_grad():
    image = model.sample(torch.full((1, 3, 8, 8), 0.5), n=1, temperature=0.0)
assert image.shape == (1, 1, 3, 32, 32) and image.isfinite().all()
print("torch", torch.__version__, "with", ops.backends()["native"].reason)
"""


class Failed(Exception):
    """A build or a trial failed; the text names the log."""


def folder(cuda: bool) -> Path:
    return ROOT / ("wheels" if cuda else "dist")


def _run(command: list[str], log: Path, variables: dict[str, str], cwd: Path = ROOT) -> str:
    """What a command prints, which is added to the log too. Raises Failed."""
    done = subprocess.run(
        command, env=variables, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    with log.open("a") as file:
        file.write(done.stdout)
    if done.returncode:
        raise Failed(f"FAILED, see {log.relative_to(ROOT)}")
    return done.stdout


def build(version: str, cuda: bool) -> Path:
    """The wheel for a Python. Raises Unavailable where there is no such Python, Failed where the build fails."""
    out, tag = folder(cuda), f"cp{version.replace('.', '')}"
    command = [interpreter(version), "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    for stale in (*out.glob(f"*-{tag}-*.whl"), *(ROOT / "build").glob("lib*")):  # and copies of modules of an earlier time
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    log = out / f"{tag}.log"
    log.unlink(missing_ok=True)
    kernels = {"NCSR_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES} if cuda else {"NCSR_FAST_CUDA": "0"}
    _run(command, log, os.environ | kernels)
    (wheel,) = out.glob(f"*-{tag}-*.whl")
    return wheel


def tried(version: str, wheel: Path, torch: str) -> str:
    """What a new environment without a compiler says of a wheel that it has installed. Raises Failed."""
    log = wheel.parent / f"cp{version.replace('.', '')}.log"
    with tempfile.TemporaryDirectory() as place:
        environment = Path(place, "environment")
        _run([interpreter(version), "-m", "venv", str(environment)], log, dict(os.environ))
        programs = environment / "bin"
        variables = os.environ | {"PATH": str(programs), "CC": "/bin/false", "CXX": "/bin/false"}
        _run([str(programs / "pip"), "install", "--quiet", torch, str(wheel)], log, variables, Path(place))
        said = _run([str(programs / "python"), "-W", "ignore", "-c", _TRIAL], log, variables, Path(place))
    return said.strip().rpartition("\n")[2]


def commit() -> str:
    """The checkout's commit, which ends in "-dirty" when a tracked file has changed."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True)
    return said.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="VERSION", help=f"of {', '.join(PYTHONS)} (default: all)")
    parser.add_argument("--cuda", action="store_true", help="with CUDA kernels; not tried here")
    parser.add_argument("--torch", default="torch", help="requirement that a wheel is tried with (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.pythons) - {*PYTHONS}:
        parser.error(f"no Python {', '.join(sorted(unknown))}; there are {', '.join(PYTHONS)}")
    out = folder(args.cuda)
    out.mkdir(exist_ok=True)
    (out / "COMMIT").write_text(commit() + "\n")
    status = 0
    for version in args.pythons or PYTHONS:
        try:
            wheel = build(version, args.cuda)
            outcome = f"{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 2**20:.1f} MiB"
            if not args.cuda:
                outcome += f", tried: {tried(version, wheel, args.torch)}"
        except Unavailable as reason:
            outcome, status = f"left out: {reason}", status or 2
        except Failed as reason:
            outcome, status = str(reason), 1
        print(f"{version:5} {outcome}", flush=True)
    size = sum(wheel.stat().st_size for wheel in out.glob("*.whl"))
    if args.cuda and size > _MOST_BYTES:
        print(f"all wheels together are {size / 2**20:.1f} MiB, more than {_MOST_BYTES // 2**20} MiB: too large to be carried")
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
