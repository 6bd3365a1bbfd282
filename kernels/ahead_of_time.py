"""Registers, shared memory and spills of every kernel, compiled for GPUs that need not be there.

`python -m ncsr_fast.kernels.ahead_of_time [--targets 80 90 100] [--channels 12 24 48 96 192] [--json]` prints, for each
kernel, target and number of channels, the most that any call needs; `report` returns every call. The host functions
are called on meta tensors, under a driver that compiles as a GPU's driver would, reads the binary instead of loading
it, and launches nothing: what is compiled is what a launch would run. Written for Triton 3.6; TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ncsr_fast import kernels

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
CHANNELS = (12, 24, 48, 96, 192)  # of the published models
SIZE = (18, 80, 80)  # batch, height and width of the calls, as in training: the weight gradient loops over many tiles


@dataclass(frozen=True)
class Row:
    """A kernel of a call, compiled for a target: registers of a thread, bytes of shared memory of a program, and more.

    spills: bytes of a thread's stack, where what does not fit in registers is kept
    tf32: whether any product is computed in TF32, which the interpreter would not show
    """

    target: int
    channels: int
    operator: str
    kernel: str
    call: str
    registers: int
    shared: int
    spills: int
    tf32: bool


class _CompilingDriver:
    """What Triton asks of the driver of a GPU, answered for a target without one. `launched` collects the kernels."""

    def __init__(self, target: int):
        self.target = target
        self.launched: list[dict[str, int | bool]] = []  # the fields of a row that say what a kernel needs
        self.utils = self
        self.ptx = ""

    def compiled(self, *, src, metadata_group: dict[str, str], **_) -> None:
        """Triton's listener: it has compiled the kernel that it will load next."""
        self.ptx = Path(metadata_group[f"{src.name}.ptx"]).read_text(encoding="utf-8")

    def get_current_device(self) -> int:
        return self.target  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # the report shows what is too much

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, most threads); the function is what a launch is given."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack = map(int, re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", usage).groups())
        needs = {"registers": registers, "shared": shared, "spills": stack, "tf32": "tf32" in self.ptx}
        return self, {"kernel": name, **needs}, registers, stack, 1024

    def launcher_cls(self, source, metadata) -> Callable:
        # a compiled kernel outlives the driver that loaded it
        return lambda x, y, z, stream, function, *rest: driver.active.launched.append(function)


def calls(channels: int) -> Iterator[tuple[str, str, Callable]]:
    """Operator, name and body of calls of every host function: both directions, layouts and dtypes of h."""
    layouts = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for direction, layout, dtype in itertools.product(("forward", "inverse"), layouts, dtypes):
        inverse = direction == "inverse"

        def empty(c: int, dtype: torch.dtype = torch.float32, layout: str = layout) -> Tensor:
            batch, height, width = SIZE
            return torch.empty(batch, c, height, width, dtype=dtype, device="meta", memory_format=layouts[layout])

        x, mix, dlogdet = empty(channels), torch.empty(channels, channels, device="meta"), torch.empty(SIZE[0], device="meta")
        half = channels // 2
        whole, changed = empty(2 * channels, dtypes[dtype]), empty(2 * (channels - half), dtypes[dtype])
        name = f"{direction} {layout} h={dtype}"
        yield (
            "affine",
            name,
            lambda: (
                kernels.affine_fwd(x, changed, half, 1e-4, inverse),
                kernels.affine_bwd(x, dlogdet, x, changed, half, 1e-4, inverse),
            ),
        )
        yield (
            "gaussian",
            name,
            lambda: (
                kernels.gaussian_fwd(x, changed, inverse),
                kernels.gaussian_bwd(x, dlogdet, x, changed, inverse),
            ),
        )
        steps = {"step": (whole, changed) if inverse else (changed, whole)}
        if dtype == "float32":  # there is no h in it
            steps["step without h"] = (None, None)
        for operator, h in steps.items():
            yield (
                operator,
                name,
                lambda: (
                    kernels.step_fwd(x, mix, mix[0], *h, 1e-4, inverse),
                    kernels.step_bwd(x, dlogdet, x, x, mix, *h, 1e-4, inverse),
                ),
            )

    weight = torch.empty(18, channels, channels, dtype=torch.float64, device="meta")
    yield "inverse_logdet", "any", lambda: kernels.inverse_logdet(weight)


def compile_for(target: int, channels: int) -> list[Row]:
    """The rows of one target and number of channels. Leaves its driver behind, so it wants a process of its own."""
    compiling = _CompilingDriver(target)
    driver.set_active(compiling)
    triton.knobs.compilation.listener = compiling.compiled
    rows = []
    for operator, call, body in calls(channels):
        compiling.launched.clear()
        body()
        rows += [Row(target, channels, operator, call=call, **needs) for needs in compiling.launched]
    return rows


def report(targets: Sequence[int] = TARGETS, channels: Sequence[int] = CHANNELS, processes: int | None = None) -> list[Row]:
    """A row for every kernel that any of the calls launches."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("ahead_of_time compiles the kernels, so the variable TRITON_INTERPRET must not be set")
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = pool.map(compile_for, *zip(*itertools.product(targets, channels), strict=True))
        return [row for rows in found for row in rows]


def worst(rows: Sequence[Row]) -> list[Row]:
    """The most that any call needs, of every kernel, target and number of channels."""
    most: dict[tuple, Row] = {}
    fields = ("registers", "shared", "spills", "tf32")
    for row in rows:
        key = (row.target, row.channels, row.operator, row.kernel)
        known = most.setdefault(key, replace(row, call="any"))
        most[key] = replace(known, **{n: max(getattr(known, n), getattr(row, n)) for n in fields})
    return list(most.values())


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'target':7}{'C':>4}  {'operator':15}{'kernel':24}{'registers':>10}{'shared B':>10}{'spilled B':>10}"]
    for r in rows:
        sizes = f"{r.registers:10}{r.shared:10}{r.spills:10}"
        lines.append(f"sm_{r.target:<4}{r.channels:4}  {r.operator:15}{r.kernel:24}{sizes}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities, such as 90")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--json", action="store_true", help="every call, as a list of rows")
    options = parser.parse_args()
    rows = report(options.targets, options.channels)
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(worst(rows)))


if __name__ == "__main__":
    main()
