"""`make wheel-gpu`: a wheel for each Python there is, and what is said of the others. Nothing is compiled here."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from installation import CHECKOUT

# stands for a Python whose `pip wheel` makes a file of a name and a size
_PYTHON = """#!/bin/sh
[ "$NCSR_FAST_CUDA/$TORCH_CUDA_ARCH_LIST" = "1/8.0;9.0;10.0" ] || exit 7
echo "$@"
head -c {size} /dev/zero > "$6/ncsr_fast-0-{tag}-{tag}-linux.whl"
exit {status}
"""


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """The program, with its folder elsewhere; `pythons` has the size and the exit status for each version that there is."""
    monkeypatch.syspath_prepend(str(CHECKOUT / ".ci"))
    module = importlib.import_module("wheels")
    module.pythons = {}
    monkeypatch.setattr(module, "FOLDER", tmp_path / "wheels")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "commit", lambda: "abc-dirty")

    def interpreter(version: str) -> str:
        if version not in module.pythons:
            raise module.Unavailable(f"there is no Python {version}")
        size, status = module.pythons[version]
        script = tmp_path / f"python{version}"
        script.write_text(_PYTHON.format(size=size, status=status, tag=f"cp{version.replace('.', '')}"))
        script.chmod(0o755)
        return str(script)

    monkeypatch.setattr(module, "interpreter", interpreter)
    return module


def status_of(wheels, monkeypatch, *pythons: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wheels.py", *pythons])
    with pytest.raises(SystemExit) as ended:
        wheels.main()
    return ended.value.code


def test_each_python_has_a_wheel_or_is_named(wheels, monkeypatch, tmp_path, capsys):
    wheels.pythons = {"3.11": (3 * 2**19, 0), "3.12": (5, 0)}
    stale = tmp_path / "build" / "lib.linux-cpython-312"
    stale.mkdir(parents=True)
    wheels.FOLDER.mkdir()
    (wheels.FOLDER / "ncsr_fast-0-cp312-cp312-old.whl").touch()
    assert status_of(wheels, monkeypatch) == 2
    assert capsys.readouterr().out.splitlines() == [
        "3.10  left out: there is no Python 3.10",
        "3.11  wheels/ncsr_fast-0-cp311-cp311-linux.whl, 1.5 MiB",
        "3.12  wheels/ncsr_fast-0-cp312-cp312-linux.whl, 0.0 MiB",
        "3.13  left out: there is no Python 3.13",
    ]
    assert (wheels.FOLDER / "COMMIT").read_text() == "abc-dirty\n"
    assert not stale.exists(), "a wheel has no module of an earlier time"
    assert (wheels.FOLDER / "cp312.log").read_text() == f"-m pip wheel --no-deps --wheel-dir {wheels.FOLDER} {tmp_path}\n"


def test_only_the_pythons_that_are_asked_for(wheels, monkeypatch, capsys):
    wheels.pythons = {"3.11": (5, 0), "3.12": (5, 0)}
    assert status_of(wheels, monkeypatch, "3.12") == 0
    assert [path.name for path in wheels.FOLDER.glob("*.whl")] == ["ncsr_fast-0-cp312-cp312-linux.whl"]
    assert status_of(wheels, monkeypatch, "3.9") == 2
    assert "no Python 3.9; there are 3.10, 3.11" in capsys.readouterr().err


def test_a_build_that_fails_stops_none(wheels, monkeypatch, capsys):
    wheels.pythons = {"3.10": (5, 1), "3.11": (5, 0)}
    assert status_of(wheels, monkeypatch, "3.10", "3.11") == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "3.10  FAILED, see wheels/cp310.log" and second.startswith("3.11  wheels/")


def test_wheels_that_cannot_be_carried_are_a_failure(wheels, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "_MOST_BYTES", 2**20)
    wheels.pythons = {"3.10": (2**20, 0), "3.11": (2**20, 0)}
    assert status_of(wheels, monkeypatch, "3.10", "3.11") == 1
    assert "all wheels together are 2.0 MiB, more than 1 MiB" in capsys.readouterr().out


def test_the_script_is_bash():
    script = CHECKOUT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
