"""Work of a compiled kernel, read from its disassembly, by loop depth: outside loops, inside one loop, inside two, and so on.

The numbers at a depth count each instruction once; a warp's work is their sum, each times the trips of the loops around it.
Both sides of a branch count, and so does a path for rare values, such as a division by a denormal.
"""

from __future__ import annotations

import re
from itertools import accumulate

_LINE = re.compile(r"^\s*(?:(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)(.*))", re.MULTILINE)
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z0-9_.]+)", re.MULTILINE)  # of a line of SASS
_TENSOR_CORES = re.compile(r"(UTC)?[A-Z]G?MMA\b")  # HMMA of sm_80, HGMMA of sm_90, UTCHMMA of sm_100; not HFMA2.MMA
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_ACCESS = re.compile(r"(LDG|STG|LDGSTS)\.")  # to global memory
_GROUP_PRODUCT = re.compile(r"[A-Z]*GMMA\.(\d+)x(\d+)x(\d+)")  # of 4 warps together: sm_90
_WARP_PRODUCT = re.compile(r"[A-Z]*MMA\.(16)(8)(\d+)\b")  # of a warp
_FP32 = {"FFMA": 2, "FADD": 1, "FMUL": 1}  # operations of a thread
_WARP = 32  # threads


def instructions(sass: str) -> dict[str, int | float]:
    """The fields of a row that follow from the disassembly of a kernel."""
    opcodes = _OPCODE.findall(sass)
    widths = [width(opcode) for opcode in opcodes if _ACCESS.match(opcode)]
    shares = {least: sum(w for w in widths if w >= least) / max(1, sum(widths)) for least in (16, 8)}
    tensor_cores = sum(_TENSOR_CORES.match(opcode) is not None for opcode in opcodes)
    return {"instructions": len(opcodes), "wide": shares[16], "middling": shares[8], "tensor_cores": tensor_cores}


def work(sass: str) -> dict[str, list[int]]:
    """The instructions, FLOPs and bytes of a warp, by the number of loops around them.

    Returns:
        issued: instructions.
        tensor_flops: of products on tensor cores, a multiplication and an addition being two; sm_80 and sm_90 alone tell.
        fp32_flops: of float32 arithmetic.
        accessed: bytes that its threads read from and write to global memory, masked ones included.
    """
    labels, found = {}, []
    for label, opcode, operands in _LINE.findall(sass):
        if label:
            labels[label] = len(found)
        elif opcode != "NOP":
            found.append((opcode, operands))
    depths = _depths(labels, found)
    total = {name: [0] * (max(depths, default=0) + 1) for name in ("issued", "tensor_flops", "fp32_flops", "accessed")}
    for depth, (opcode, _) in zip(depths, found):
        total["issued"][depth] += 1
        total["tensor_flops"][depth] += _tensor_flops(opcode)
        total["fp32_flops"][depth] += _WARP * _FP32.get(opcode.partition(".")[0], 0)
        total["accessed"][depth] += _WARP * width(opcode) if _ACCESS.match(opcode) else 0
    return total


def width(opcode: str) -> int:
    """The number of bytes that a thread moves with an instruction to global memory."""
    parts = opcode.split(".")
    return next((size // 8 for size in (256, 128, 64) if str(size) in parts), 2 if {"U16", "16"} & {*parts} else 4)


def _depths(labels: dict[str, int], found: list[tuple[str, str]]) -> list[int]:
    """The number of loops around each instruction; a loop ends with the last branch back to its first instruction."""
    ends: dict[int, int] = {}
    for index, (opcode, operands) in enumerate(found):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        if target and labels[target[1]] < index:  # a branch to itself marks the end of a kernel's code
            ends[labels[target[1]]] = index
    changes = [0] * (len(found) + 1)
    for start, end in ends.items():
        changes[start] += 1
        changes[end + 1] -= 1
    return list(accumulate(changes))[: len(found)]


def _tensor_flops(opcode: str) -> int:
    """The FLOPs of a tensor-core instruction of a warp."""
    for pattern, warps in ((_GROUP_PRODUCT, 4), (_WARP_PRODUCT, 1)):
        if match := pattern.match(opcode):
            rows, columns, inner = map(int, match.groups())
            return 2 * rows * columns * inner // warps
    return 0
