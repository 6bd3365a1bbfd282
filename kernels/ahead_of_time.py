"""Registers, shared memory, spills and widths of loads of every kernel, compiled for GPUs of any kind without a GPU.

`python -m ncsr_fast.kernels.ahead_of_time [--targets 80 90 100] [--channels 12 24 48 96 192] [--variants every] [--json]`
prints, for each kernel, target and number of channels, the largest need of any call. `--networks bf16 tf32 fp32` and
`--convolutions …` do this for networks, or for convolutions, in these precisions. `report` returns every call, and
`compiled_kernels` the number of kernels compiled for images of several sizes. The host functions are called on meta tensors,
under a driver that compiles like a GPU's driver, reads the binary instead of loading it, and launches nothing. So the compiled
kernels are those that a launch would run. The module is written for Triton 3.6; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ncsr_fast.kernels.calls import (
    EVERY_VARIANT,
    PRECISIONS,
    SIZE,
    VARIANTS,
    Variant,
    convolution_calls,
    coupled_calls,
    dense_block_calls,
    filter_calls,
    flow_calls,
    hoisting_calls,
    large_coupled_calls,
    network_backward_calls,
    network_calls,
    together_calls,
)
from ncsr_fast.kernels.disassembly import instructions, work

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
CHANNELS = (12, 24, 48, 96, 192)  # of the published models
Calls = Callable[..., Iterator[tuple[str, str, Callable]]]  # (channels, size, variants), as those of `kernels.calls`
PRODUCTS: dict[str, Calls] = {  # of tensor cores
    "networks": network_calls,
    "gradients": network_backward_calls,
    "filters": filter_calls,
    "convolutions": convolution_calls,
    "steps": coupled_calls,
    "large-steps": large_coupled_calls,
    "encoder": dense_block_calls,
    "hoisting": hoisting_calls,
    "together": together_calls,
}
SIZES = (SIZE, (1, 40, 36), (16, 79, 77), (10, 510, 4), (3, 6, 6))  # pixels that 16 divides, or nothing, or 8, or 4
_KERNELS = __package__ + "."


@dataclass(frozen=True)
class Row:
    """A kernel of a call, compiled for a target: registers of a thread, bytes of shared memory of a program, and more.

    spills: bytes of a thread's stack, where what does not fit in registers is kept; of one that is read or written
    instructions: of the binary, each counted once
    wide: share of the bytes of its instructions to global memory that are in those of 16 bytes, the most of sm_80 and sm_90
    middling: the same of 8 bytes or more
    tensor_cores: instructions of tensor cores
    tf32: whether any product is computed in TF32, which the interpreter would not show
    issued, tensor_flops, fp32_flops, accessed: of a warp, by the number of loops around it (`disassembly.work`)
    function: the host function that launched it
    programs, warps: that were launched, and of a program
    bytes: of the tensors it was given
    arguments: the whole numbers that it was given, constants included
    """

    target: int
    channels: int
    operator: str
    kernel: str
    call: str
    registers: int
    shared: int
    spills: int
    instructions: int
    wide: float
    middling: float
    tensor_cores: int
    tf32: bool
    issued: list[int]
    tensor_flops: list[int]
    fp32_flops: list[int]
    accessed: list[int]
    function: str
    programs: int
    warps: int
    bytes: int
    arguments: dict[str, int]


class _CompilingDriver:
    """A driver for Triton that stands in for the driver of a target GPU.

    `launched` collects, of every launch, the fields of a row that its kernel decides, one object a kernel, and the others.
    """

    def __init__(self, target: int):
        self.target = target
        self.launched: list[tuple[dict[str, Any], dict[str, Any]]] = []
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
            usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
            sass = _output_of(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        registers, stack = map(int, re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", usage).groups())
        spills = stack if re.search(r"\b(LDL|STL)\b", sass) else 0  # ptxas reserves some that it does not use
        needs = {"registers": registers, "shared": shared, "spills": spills, "tf32": "tf32" in self.ptx, **instructions(sass)}
        needs |= work(sass)
        return self, {"kernel": name, **needs}, registers, stack, 1024

    def launcher_cls(self, source, metadata) -> Callable:
        names, warps = source.fn.arg_names, metadata.num_warps

        def launch(x: int, y: int, z: int, stream: int, function: dict[str, Any], *rest: Any) -> None:
            given = dict(zip(names, rest[-len(names) :]))
            started = {"function": _host_function(), "programs": x * y * z, "warps": warps}
            numbers = {name: value for name, value in given.items() if isinstance(value, int)}
            # a compiled kernel outlives the driver that loaded it
            driver.active.launched.append((function, {**started, "bytes": _bytes(given.values()), "arguments": numbers}))

        return launch


def _host_function() -> str:
    """The function of the kernels that was called from outside them."""
    frame, found = sys._getframe(1), ""
    while frame is not None:
        module = frame.f_globals["__name__"]
        if module.startswith(_KERNELS) and module not in (__name__, flow_calls.__module__):
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def _bytes(arguments: Iterable[Any]) -> int:
    """Bytes of the tensors among the arguments of a kernel, those in tuples included."""
    found = [argument for argument in pytree.tree_leaves(list(arguments)) if isinstance(argument, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _compiling(target: int) -> _CompilingDriver:
    """Install the driver of a target; it is not removed, so use a process of its own."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("ahead_of_time compiles the kernels, so the variable TRITON_INTERPRET must not be set")
    compiling = _CompilingDriver(target)
    driver.set_active(compiling)
    triton.knobs.compilation.listener = compiling.compiled
    return compiling


def compile_for(
    target: int,
    channels: int,
    variants: Sequence[Variant] | Sequence[str] = EVERY_VARIANT,
    called: Calls = flow_calls,
    size: tuple[int, int, int] = SIZE,
) -> list[Row]:
    """The rows of one target, number of channels and size, of some variants of `called`."""
    compiling, rows = _compiling(target), []
    for operator, call, body in called(channels, size, variants):
        compiling.launched.clear()
        body()
        rows += [Row(target, channels, operator, call=call, **needs, **rest) for needs, rest in compiling.launched]
    return rows


def report(
    targets: Sequence[int] = TARGETS,
    channels: Sequence[int] = CHANNELS,
    variants: Sequence[Variant] | Sequence[str] = EVERY_VARIANT,
    called: Calls = flow_calls,
    processes: int | None = None,
) -> list[Row]:
    """A row for every kernel that any of the calls launches."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = pool.map(compile_for, *zip(*itertools.product(targets, channels, [variants], [called]), strict=True))
        return [row for rows in found for row in rows]


def compiled_kernels(
    target: int,
    channels: int,
    variant: Variant | str,
    called: Calls = flow_calls,
    sizes: Sequence[tuple[int, int, int]] = SIZES,
) -> int:
    """The largest number of compiled versions of a kernel for images of these sizes.

    One variant is enough: direction, dtype and precision do not change how a kernel depends on the size.
    """
    compiling, found = _compiling(target), {}
    for size in sizes:
        for operator, call, body in called(channels, size, [variant]):
            # matrices have no other sizes, and a batch of 1 shares nothing
            if call != "any" and not call.startswith("shared"):
                compiling.launched.clear()
                body()
                for i, (launched, _) in enumerate(compiling.launched):  # one object for each kernel that was compiled
                    found.setdefault((operator, call, i), {})[id(launched)] = launched
    return max(map(len, found.values()))


def worst(rows: Sequence[Row]) -> list[Row]:
    """The most that any call needs, and the least share of wide accesses, of every kernel, target and number of channels."""
    worst_of = {"registers": max, "shared": max, "spills": max, "instructions": max, "tensor_cores": max, "tf32": max}
    worst_of |= {"wide": min, "middling": min}
    found: dict[tuple, Row] = {}
    for row in rows:
        key = (row.target, row.channels, row.operator, row.kernel)
        known = found.setdefault(key, replace(row, call="any"))
        found[key] = replace(known, **{n: of(getattr(known, n), getattr(row, n)) for n, of in worst_of.items()})
    return list(found.values())


def table(rows: Sequence[Row]) -> str:
    needs = f"{'registers':>10}{'shared B':>10}{'spilled B':>10}{'16-byte':>9}{'MMA':>5}"
    lines = [f"{'target':7}{'C':>4}  {'operator':20}{'kernel':24}{needs}"]
    for r in rows:
        sizes = f"{r.registers:10}{r.shared:10}{r.spills:10}{r.wide:9.0%}{r.tensor_cores:5}"
        lines.append(f"sm_{r.target:<4}{r.channels:4}  {r.operator:20}{r.kernel:24}{sizes}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities, such as 90")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--variants", choices=VARIANTS, default="every", help="directions, layouts and dtypes of the calls")
    for name in PRODUCTS:
        parser.add_argument(f"--{name}", choices=PRECISIONS, nargs="+", help=f"report only the {name}, in these precisions")
    parser.add_argument("--json", action="store_true", help="print every call, as a JSON list of rows")
    options = parser.parse_args()
    jobs = [(given, called) for name, called in PRODUCTS.items() if (given := getattr(options, name.replace("-", "_")))]
    rows = []
    for variants, called in jobs or [(VARIANTS[options.variants], flow_calls)]:
        rows += report(options.targets, options.channels, variants, called)
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(worst(rows)))


if __name__ == "__main__":
    main()
