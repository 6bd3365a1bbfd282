"""The package under test: installed, of this checkout, and with every backend that the tests expect of this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
BACKENDS = ("reference", "native", "triton")  # written out: one that is gone must be missed
VARIABLE = "NCSR_FAST_CELLS"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU, slowly


class Incomplete(Exception):
    """Tests of this package would pass over what they should fail for; the text says why, and what to do."""


def check() -> None:
    """Raise Incomplete unless the installation is whole."""
    _check_installed()
    _check_backends()


def cells() -> list[tuple[str, str]]:
    """Pairs of a device and a backend that the operators are tested on, those of `NCSR_FAST_CELLS` if it is set.

    They are what this machine should have, whether it has them or not. Triton's kernels are expected on the GPU if there is
    one, else on the CPU, in Triton's interpreter.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    every = [(device, backend) for device in devices for backend in BACKENDS]
    every = [cell for cell in every if cell != ("cpu", "triton") or "cuda" not in devices]
    wanted = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    unknown = set(wanted) - {*BACKENDS, *("-".join(cell) for cell in every)}
    if unknown:
        names = ", ".join([*BACKENDS, *("-".join(cell) for cell in every)])
        raise Incomplete(f"{VARIABLE}={os.environ[VARIABLE]!r}: {', '.join(sorted(unknown))}: expected some of {names}")
    return [cell for cell in every if not wanted or cell[1] in wanted or "-".join(cell) in wanted]


def expects(backend: str) -> bool:
    """Whether a backend is tested on any device."""
    return any(cell[1] == backend for cell in cells())


def _check_installed() -> None:
    remedy = "`make dev` installs this checkout for development, `make test` installs a copy and tests it"
    spec = importlib.util.find_spec("ncsr_fast")
    if spec is None:
        raise Incomplete(f"ncsr_fast is not installed: {remedy}")
    package = Path(spec.origin).resolve().parent
    absent = [name for name in ("kernels", "benchmarks") if importlib.util.find_spec(f"ncsr_fast.{name}") is None]
    if absent:
        raise Incomplete(f"the package in {package} is a source tree that is not installed: {remedy}")
    editable = _editable_checkout()
    if editable is not None and (editable != CHECKOUT or package.parent != CHECKOUT):
        raise Incomplete(f"the tests of {CHECKOUT} would run against {package}, installed from {editable}: {remedy}")

    if editable is not None:
        _check_compiled(package)


def _check_compiled(package: Path) -> None:
    """A compiled module from before a change in csrc/ fails in obscure ways, or passes tests of the code it replaced."""
    for module in package.glob("_native.*.so"):
        sources = [path for path in (CHECKOUT / "csrc").rglob("*") if path.is_file()]
        newer = [path.relative_to(CHECKOUT) for path in sources if path.stat().st_mtime > module.stat().st_mtime]
        if newer:
            raise Incomplete(f"{min(newer)} has changed since {module.name} was compiled: run `make dev` again")


def _editable_checkout() -> Path | None:
    """Folder of the checkout that is installed as it lies, None if a copy is installed."""
    # a checkout may hold an egg-info as well, which has no record of an installation
    for found in importlib.metadata.distributions(name="ncsr_fast"):
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return Path(origin["url"].removeprefix("file://")).resolve()
    return None


def _check_backends() -> None:
    from ncsr_fast import ops

    for device, backend in cells():
        found = ops.backends(device)[backend]
        if not found.available:
            raise Incomplete(
                f"backend {backend!r} is missing on the {device} device: {found.reason}. `make dev` installs what it needs; "
                f"{VARIABLE}={','.join('-'.join(cell) for cell in cells() if cell != (device, backend))} tests without it"
            )
