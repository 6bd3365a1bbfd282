"""The fast tests in other environments: the oldest and the newest Python and torch, and less of the processor.

    make matrix

Environments are made in .matrix/, which git ignores; what was printed in a cell is in .matrix/CELL.log. A line is printed for
each cell. The exit status is 1 if tests fail in one, and 2 if none fails but one could not be run. Interpreters are looked for
as python3.10 and so on, and among pyenv's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".matrix"
_REFUSED = 4  # pytest.ExitCode.USAGE_ERROR


class Unavailable(Exception):
    """A cell cannot be run here; the text says why."""


@dataclass(frozen=True)
class Cell:
    """An environment, and what is set in it while the tests run."""

    name: str
    environment: str  # cells may share one
    python: str = ""  # version, or that of this process
    torch: str = ""  # requirement, or that of --torch
    extra: str = "test"
    oldest: bool = False  # of each package, the oldest release that pyproject.toml admits
    variables: dict[str, str] = field(default_factory=dict)


CELLS = [
    # its Triton is older than the kernels, so they are not tested there but with the oldest torch that has one for them
    Cell("oldest", "oldest", "3.10", "torch==2.4.*", "test-without-triton", True, {"NCSR_FAST_CELLS": "reference,native"}),
    Cell("oldest-triton", "oldest-triton", "3.10", "torch==2.7.*", oldest=True),
    Cell("newest", "newest", "3.13", "torch"),
    Cell("cpu-default", "current", variables={"ATEN_CPU_CAPABILITY": "default", "NCSR_FAST_INSTRUCTION_SET": "baseline"}),
    Cell("cpu-avx2", "current", variables={"ATEN_CPU_CAPABILITY": "avx2", "NCSR_FAST_INSTRUCTION_SET": "avx2"}),
    Cell("onednn-avx2", "current", variables={"ONEDNN_MAX_CPU_ISA": "AVX2"}),
]


def interpreter(version: str) -> str:
    """The command of a Python of this version. Raises Unavailable where there is none."""
    if not version:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for command in [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]:
        said = command and subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
        if said and said.startswith(f"Python {version}."):
            return command
    raise Unavailable(f"there is no Python {version}")


def oldest_releases(extra: str) -> list[str]:
    """A constraint for each lower bound in pyproject.toml but torch's, and Triton's where an extra does without it."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project]")[2]
    others = {"torch", "triton"} if extra == "test-without-triton" else {"torch"}
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)[";]', text)
    return sorted({f"{name}=={version}.*" for name, version in bounds if name not in others})


def install(cell: Cell, torch: str, log: Path) -> Path:
    """The folder of the cell's programs, with the checkout installed anew. Raises Unavailable."""
    environment = FOLDER / cell.environment
    programs = environment / "bin"
    constraints = FOLDER / f"{cell.environment}.txt"
    constraints.write_text("\n".join(oldest_releases(cell.extra) if cell.oldest else []))
    # eager: as new as they would be in an environment that is made now
    commands = [
        [str(programs / "pip"), "install", "--upgrade", "--upgrade-strategy", "eager", "--constraint", str(constraints)]
        + [cell.torch or torch, f".[{cell.extra}]"]
    ]
    if not programs.exists():
        commands.insert(0, [interpreter(cell.python), "-m", "venv", str(environment)])
    for folder in (ROOT / "build").glob("lib*"):  # a copy of an earlier time
        shutil.rmtree(folder)
    with log.open("w") as file:
        for command in commands:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"NCSR_FAST_CUDA": "0"}, check=False
            )
            if done.returncode:
                raise Unavailable(f"{' '.join([*command[1:3], '…', *command[-2:]])} failed, see {log.relative_to(ROOT)}")
    return programs


def tested(cell: Cell, programs: Path, log: Path) -> tuple[bool, str]:
    """Whether the fast tests pass, and pytest's closing line. Raises Unavailable where pytest refuses to begin."""
    command = [str(programs / "pytest"), "-m", "not slow", "-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    with log.open("a") as file:
        run = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | cell.variables, check=False
        )
    closing = [line.strip("= \n") for line in log.read_text().splitlines() if line.strip()][-1]
    if run.returncode == _REFUSED:  # by tests/conftest.py, with a reason: this CPU lacks the instruction set, say
        raise Unavailable(closing)
    return run.returncode == 0, closing


def versions(programs: Path) -> str:
    code = "import platform, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}')"
    return subprocess.run(
        [programs / "python", "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(cell.name for cell in CELLS)} (default: all)")
    parser.add_argument("--torch", default="torch", help="requirement of the cells on this Python (default: %(default)s)")
    args = parser.parse_args()
    unknown = set(args.cells) - {cell.name for cell in CELLS}
    if unknown:
        parser.error(f"no cell {', '.join(sorted(unknown))}; there are {', '.join(cell.name for cell in CELLS)}")
    FOLDER.mkdir(exist_ok=True)
    status = 0
    for cell in (cell for cell in CELLS if not args.cells or cell.name in args.cells):
        log = FOLDER / f"{cell.name}.log"
        try:
            programs = install(cell, args.torch, log)
            passed, closing = tested(cell, programs, log)
        except Unavailable as reason:
            print(f"{cell.name:13} not run: {reason}", flush=True)
            status = status or 2
            continue
        variables = "".join(f", {name}={value}" for name, value in cell.variables.items())
        print(f"{cell.name:13} {'ok' if passed else 'FAILED'}: {versions(programs)}{variables}: {closing}", flush=True)
        status = status if passed else 1
    sys.exit(status)


if __name__ == "__main__":
    main()
