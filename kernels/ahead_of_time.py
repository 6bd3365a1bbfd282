"""Registers, shared memory, spills and widths of loads of every kernel, compiled for GPUs that need not be there.

`python -m ncsr_fast.kernels.ahead_of_time [--targets 80 90 100] [--channels 12 24 48 96 192] [--variants every] [--json]`
prints, for each kernel, target and number of channels, the most that any call needs, or with `--networks` or `--convolutions`
of the networks of the steps, or of convolutions of so many channels, at each of the precisions named (float32 tf32 bfloat16);
`report` returns every call, and `compiled_kernels` the number of kernels that are compiled for images of several sizes. The
host functions are called on meta tensors, under a driver that compiles as a GPU's driver would, reads the binary instead of
loading it, and launches nothing: what is compiled is what a launch would run. Written for Triton 3.6; TRITON_INTERPRET unset.
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
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of h
Variant = tuple[str, str, str]  # direction, layout and dtype of a call
EVERY_VARIANT: tuple[Variant, ...] = tuple(itertools.product(("forward", "inverse"), LAYOUTS, DTYPES))
# "pairs": each two of a direction, layout and dtype are in one of them; "engine": those in the engine's layout
PAIRS: tuple[Variant, ...] = (
    ("forward", "nhwc", "float32"),
    ("inverse", "nhwc", "bfloat16"),
    ("forward", "nchw", "bfloat16"),
    ("inverse", "nchw", "float32"),
)
VARIANTS = {"every": EVERY_VARIANT, "pairs": PAIRS, "engine": PAIRS[:2]}
CONVOLUTIONS = ((32, False), (64, False), (64, True))  # of the encoder: outputs, and whether the input is read upsampled
HIDDEN = 64  # channels of the hidden layers of the published networks
PRECISIONS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
SIZE = (18, 80, 80)  # batch, height and width of the calls, as in training: the weight gradient loops over many tiles
SIZES = (SIZE, (1, 40, 36), (16, 79, 77), (10, 510, 4), (3, 6, 6))  # pixels that 16 divides, or nothing, or 8, or 4
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z0-9_.]+)", re.MULTILINE)  # of a line of SASS
_TENSOR_CORES = re.compile(r"(UTC)?[A-Z]G?MMA\b")  # HMMA of sm_80, HGMMA of sm_90, UTCHMMA of sm_100; not HFMA2.MMA
_ACCESS = re.compile(r"(LDG|STG|LDGSTS)\.")  # to global memory


@dataclass(frozen=True)
class Row:
    """A kernel of a call, compiled for a target: registers of a thread, bytes of shared memory of a program, and more.

    spills: bytes of a thread's stack, where what does not fit in registers is kept
    instructions: of the binary, each counted once
    wide: share of the bytes of its instructions to global memory that are in those of 16 bytes, the most of sm_80 and sm_90
    middling: the same of 8 bytes or more
    tensor_cores: instructions of tensor cores
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
    instructions: int
    wide: float
    middling: float
    tensor_cores: int
    tf32: bool


class _CompilingDriver:
    """The driver of a GPU as Triton asks it, answered for a target without one. `launched` collects the kernels."""

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
            usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
            sass = _output_of(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        registers, stack = map(int, re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+)", usage).groups())
        needs = {"registers": registers, "shared": shared, "spills": stack, "tf32": "tf32" in self.ptx, **instructions(sass)}
        return self, {"kernel": name, **needs}, registers, stack, 1024

    def launcher_cls(self, source, metadata) -> Callable:
        # a compiled kernel outlives the driver that loaded it
        return lambda x, y, z, stream, function, *rest: driver.active.launched.append(function)


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> dict[str, int | float]:
    """The fields of a row that the disassembly of a kernel tells."""
    opcodes = _OPCODE.findall(sass)
    widths = [_width(opcode) for opcode in opcodes if _ACCESS.match(opcode)]
    shares = {least: sum(w for w in widths if w >= least) / max(1, sum(widths)) for least in (16, 8)}
    tensor_cores = sum(_TENSOR_CORES.match(opcode) is not None for opcode in opcodes)
    return {"instructions": len(opcodes), "wide": shares[16], "middling": shares[8], "tensor_cores": tensor_cores}


def _width(opcode: str) -> int:
    """Bytes that an instruction to global memory moves."""
    parts = opcode.split(".")
    return next((size // 8 for size in (256, 128, 64) if str(size) in parts), 2 if {"U16", "16"} & {*parts} else 4)


def calls(
    channels: int, size: tuple[int, int, int] = SIZE, variants: Sequence[Variant] = EVERY_VARIANT
) -> Iterator[tuple[str, str, Callable]]:
    """Operator, name and body of calls of every host function."""
    for direction, layout, dtype in variants:
        inverse = direction == "inverse"

        def empty(c: int, dtype: torch.dtype = torch.float32, layout: str = layout) -> Tensor:
            batch, height, width = size
            return torch.empty(batch, c, height, width, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])

        x, mix, dlogdet = empty(channels), torch.empty(channels, channels, device="meta"), torch.empty(size[0], device="meta")
        half = channels // 2
        whole, changed = empty(2 * channels, DTYPES[dtype]), empty(2 * (channels - half), DTYPES[dtype])
        name = f"{direction} {layout} h={dtype}"
        yield (
            "affine",
            name,
            lambda: (
                kernels.affine_forward(x, changed, half, 1e-4, inverse),
                kernels.affine_backward(x, dlogdet, x, changed, half, 1e-4, inverse),
            ),
        )
        yield (
            "gaussian_split",
            name,
            lambda: (
                kernels.gaussian_split_forward(x, changed, inverse),
                kernels.gaussian_split_backward(x, dlogdet, x, changed, inverse),
            ),
        )
        steps = {"flow_step": (whole, changed) if inverse else (changed, whole)}
        if dtype == "float32":  # there is no h in it
            steps["flow_step without h"] = (None, None)
        for operator, h in steps.items():
            yield (
                operator,
                name,
                lambda: (
                    kernels.flow_step_forward(x, mix, mix[0], *h, 1e-4, inverse),
                    kernels.flow_step_backward(x, dlogdet, x, x, mix, *h, 1e-4, inverse),
                ),
            )

    weight = torch.empty(18, channels, channels, dtype=torch.float64, device="meta")
    yield "inverse_logdet", "any", lambda: kernels.inverse_logdet(weight)


def network_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[tuple[str, str, Callable]]:
    """The same of `step_network` as the engine calls it: z1 is some channels of the state, pre of all pre-activations."""
    batch, height, width = size
    for precision in precisions:
        dtype, tf32 = PRECISIONS[precision]

        def image(c: int, dtype: torch.dtype = dtype, batch: int = batch) -> Tensor:
            shape = batch, c, height, width
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

        def network(inputs: int, outputs: int, dtype: torch.dtype = dtype) -> list[Tensor | None]:
            shapes = (HIDDEN, inputs, 3, 3), (HIDDEN, HIDDEN, 1, 1), (HIDDEN,), (outputs, HIDDEN, 3, 3), (outputs,)
            return [torch.empty(shape, dtype=dtype, device="meta") if all(shape) else None for shape in shapes]

        z1 = image(channels, torch.float32)[:, : channels // 2]
        own, one = (image(4 * HIDDEN, batch=count)[:, HIDDEN : 2 * HIDDEN] for count in (batch, 1))
        shared, coupling, injector = one.expand(batch, -1, -1, -1), network(channels // 2, channels), network(0, 2 * channels)
        yield "step_network", f"coupling {precision}", lambda: kernels.step_network_forward(z1, own, *coupling, tf32=tf32)
        yield "step_network", f"shared {precision}", lambda: kernels.step_network_layers(z1, shared, *coupling, tf32=tf32)
        yield "step_network", f"injector {precision}", lambda: kernels.step_network_forward(None, own, *injector, tf32=tf32)


def convolution_calls(
    channels: int, size: tuple[int, int, int] = SIZE, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[tuple[str, str, Callable]]:
    """Likewise of convolutions of so many channels of a wider buffer, forward and backward."""
    batch, height, width = size
    for precision, (outputs, upsample2x) in itertools.product(precisions, CONVOLUTIONS):
        dtype, tf32 = PRECISIONS[precision]

        def empty(c: int, factor: int = 1, dtype: torch.dtype = dtype) -> Tensor:
            shape = batch, channels + 64, factor * height, factor * width
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)[:, :c]

        x, y, options = empty(channels), empty(outputs, 2 if upsample2x else 1), {"upsample2x": upsample2x, "tf32": tf32}
        weight, bias = torch.empty(outputs, channels, 3, 3, device="meta"), torch.empty(outputs, device="meta")
        relu, needed = (x[:, channels // 2 :], 0.2), (True, True, True)
        yield (
            "conv3x3",
            f"{outputs} outputs {precision}{' upsample2x' * upsample2x}",
            lambda: (
                kernels.conv3x3_forward(x, weight, bias, slope=0.2, out=y, **options),
                kernels.conv3x3_backward(y, x, weight, needed, relu=relu, dx=x, **options),
            ),
        )


def _compiling(target: int) -> _CompilingDriver:
    """The driver of a target, which is left behind, so it wants a process of its own."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("ahead_of_time compiles the kernels, so the variable TRITON_INTERPRET must not be set")
    compiling = _CompilingDriver(target)
    driver.set_active(compiling)
    triton.knobs.compilation.listener = compiling.compiled
    return compiling


def compile_for(
    target: int, channels: int, variants: Sequence[Variant] | Sequence[str] = EVERY_VARIANT, called: Callable = calls
) -> list[Row]:
    """The rows of one target and number of channels, of the variants of `calls`, or precisions of the others."""
    compiling, rows = _compiling(target), []
    for operator, call, body in called(channels, SIZE, variants):
        compiling.launched.clear()
        body()
        rows += [Row(target, channels, operator, call=call, **needs) for needs in compiling.launched]
    return rows


def report(
    targets: Sequence[int] = TARGETS,
    channels: Sequence[int] = CHANNELS,
    variants: Sequence[Variant] | Sequence[str] = EVERY_VARIANT,
    called: Callable = calls,
    processes: int | None = None,
) -> list[Row]:
    """A row for every kernel that any of the calls launches."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = pool.map(compile_for, *zip(*itertools.product(targets, channels, [variants], [called]), strict=True))
        return [row for rows in found for row in rows]


def compiled_kernels(
    target: int, channels: int, variant: Variant | str, called: Callable = calls, sizes: Sequence[tuple[int, int, int]] = SIZES
) -> int:
    """The most kernels that are compiled, where one size would compile one, for images of these sizes.

    Of one variant: direction, dtype and precision do not change what depends on the size.
    """
    compiling, found = _compiling(target), {}
    for size in sizes:
        for operator, call, body in called(channels, size, [variant]):
            # matrices have no other sizes, and a batch of 1 shares nothing
            if call != "any" and not call.startswith("shared"):
                compiling.launched.clear()
                body()
                for i, launched in enumerate(compiling.launched):  # one object for each kernel that was compiled
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
    for name in ("--networks", "--convolutions"):
        parser.add_argument(name, choices=PRECISIONS, nargs="+", help="at these precisions, in place of all else")
    parser.add_argument("--json", action="store_true", help="every call, as a list of rows")
    options = parser.parse_args()
    called, variants = calls, VARIANTS[options.variants]
    if options.networks or options.convolutions:
        called, variants = (network_calls, options.networks) if options.networks else (convolution_calls, options.convolutions)
    rows = report(options.targets, options.channels, variants, called)
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(worst(rows)))


if __name__ == "__main__":
    main()
