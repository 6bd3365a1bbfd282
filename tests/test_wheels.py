"""`make wheels` and `make wheel-gpu`: a wheel for each Python there is, and what is said of others. Nothing is compiled."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from installation import CHECKOUT

# stands for a Python whose `pip wheel` makes a file of a name and a size, and whose `venv` has a pip and a Python that tell
# what they are called with
_PYTHON = """#!/bin/sh
echo "$@"
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\necho pip "$@" with "$PATH" "$CXX"\\nexit {trial}\\n' > "$3/bin/pip"
    printf '#!/bin/sh\\necho of the trial\\necho "Python with $PATH"\\n' > "$3/bin/python"
    chmod +x "$3/bin/pip" "$3/bin/python"
    exit 0
fi
[ "$NCSR_FAST_CUDA/$TORCH_CUDA_ARCH_LIST" = "{kernels}" ] || exit 7
head -c {size} /dev/zero > "$6/ncsr_fast-0-{tag}-{tag}-linux.whl"
exit {status}
"""


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """The program, of another checkout; `pythons` has the size of the wheel, and the status of the build, of each version."""
    monkeypatch.syspath_prepend(str(CHECKOUT / ".ci"))
    module = importlib.import_module("wheels")
    module.pythons, module.kernels, module.trial = {}, "1/8.0;9.0;10.0", 0
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "commit", lambda: "abc-dirty")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def interpreter(version: str) -> str:
        if version not in module.pythons:
            raise module.Unavailable(f"there is no Python {version}")
        size, status = module.pythons[version]
        tag = f"cp{version.replace('.', '')}"
        script = tmp_path / f"python{version}"
        script.write_text(_PYTHON.format(size=size, status=status, tag=tag, kernels=module.kernels, trial=module.trial))
        script.chmod(0o755)
        return str(script)

    monkeypatch.setattr(module, "interpreter", interpreter)
    return module


def status_of(wheels, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wheels.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        wheels.main()
    return ended.value.code


def test_each_python_has_a_wheel_or_is_named(wheels, monkeypatch, tmp_path, capsys):
    wheels.pythons = {"3.11": (3 * 2**19, 0), "3.12": (5, 0)}
    stale, out = tmp_path / "build" / "lib.linux-cpython-312", tmp_path / "wheels"
    stale.mkdir(parents=True)
    out.mkdir()
    (out / "ncsr_fast-0-cp312-cp312-old.whl").touch()
    assert status_of(wheels, monkeypatch, "--cuda") == 2
    assert capsys.readouterr().out.splitlines() == [
        "3.10  left out: there is no Python 3.10",
        "3.11  wheels/ncsr_fast-0-cp311-cp311-linux.whl, 1.5 MiB",
        "3.12  wheels/ncsr_fast-0-cp312-cp312-linux.whl, 0.0 MiB",
        "3.13  left out: there is no Python 3.13",
    ]
    assert (out / "COMMIT").read_text() == "abc-dirty\n"
    assert not stale.exists(), "a wheel has no module of an earlier time"
    assert (out / "cp312.log").read_text() == f"-m pip wheel --no-deps --wheel-dir {out} {tmp_path}\n"


def test_a_wheel_without_cuda_is_tried_without_a_compiler(wheels, monkeypatch, tmp_path, capsys):
    wheels.pythons, wheels.kernels = {"3.12": (5, 0)}, "0/"
    assert status_of(wheels, monkeypatch, "--torch", "torch==2.13.0", "3.12") == 0
    wheel = tmp_path / "dist" / "ncsr_fast-0-cp312-cp312-linux.whl"
    said = capsys.readouterr().out.strip()
    programs = said.partition("tried: Python with ")[2]
    assert said.startswith(f"3.12  {wheel.relative_to(tmp_path)}, 0.0 MiB, tried: ") and programs.endswith("/environment/bin")
    log = (tmp_path / "dist" / "cp312.log").read_text().splitlines()
    assert log[1] == f"-m venv {programs.removesuffix('/bin')}"
    assert log[2] == f"pip install --quiet torch==2.13.0 {wheel} with {programs} /bin/false"
    assert log[3:] == ["of the trial", f"Python with {programs}"] and not Path(programs).exists()


def test_a_trial_that_fails(wheels, monkeypatch, capsys):
    wheels.pythons, wheels.kernels, wheels.trial = {"3.11": (5, 0), "3.12": (5, 0)}, "0/", 1
    assert status_of(wheels, monkeypatch, "3.11", "3.12") == 1
    assert capsys.readouterr().out.splitlines() == ["3.11  FAILED, see dist/cp311.log", "3.12  FAILED, see dist/cp312.log"]


def test_only_the_pythons_that_are_asked_for(wheels, monkeypatch, tmp_path, capsys):
    wheels.pythons = {"3.11": (5, 0), "3.12": (5, 0)}
    assert status_of(wheels, monkeypatch, "--cuda", "3.12") == 0
    assert [path.name for path in (tmp_path / "wheels").glob("*.whl")] == ["ncsr_fast-0-cp312-cp312-linux.whl"]
    assert status_of(wheels, monkeypatch, "--cuda", "3.9") == 2
    assert "no Python 3.9; there are 3.10, 3.11" in capsys.readouterr().err


def test_a_build_that_fails_stops_none(wheels, monkeypatch, capsys):
    wheels.pythons = {"3.10": (5, 1), "3.11": (5, 0)}
    assert status_of(wheels, monkeypatch, "--cuda", "3.10", "3.11") == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "3.10  FAILED, see wheels/cp310.log" and second.startswith("3.11  wheels/")


def test_wheels_that_cannot_be_carried_are_a_failure(wheels, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "_MOST_BYTES", 2**20)
    wheels.pythons = {"3.10": (2**20, 0), "3.11": (2**20, 0)}
    assert status_of(wheels, monkeypatch, "--cuda", "3.10", "3.11") == 1
    assert "all wheels together are 2.0 MiB, more than 1 MiB" in capsys.readouterr().out


def test_the_script_is_bash():
    script = CHECKOUT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
