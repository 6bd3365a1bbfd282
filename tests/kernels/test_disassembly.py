"""Work that is read from a disassembly, of a few lines whose numbers are counted by hand."""

from __future__ import annotations

import installation
import pytest

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast.kernels.disassembly import work  # noqa: E402

SASS = """\
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0030*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
.L_x_1:
        /*0040*/                   FFMA R6, R5, R4, R6 ;
        /*0050*/                   FADD.FTZ R6, R5, R6 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   HMMA.16816.F32.BF16 R20, R24.reuse, R10, R20 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/               @P3 BRA `(.L_x_0) ;
.L_x_2:
        /*00b0*/                   HGMMA.64x32x8.F32.TF32 R24, gdesc[UR4], R24 ;
        /*00c0*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;
        /*00d0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
        /*0100*/                   NOP;
"""


def test_work():
    assert work(SASS) == {
        # 3 before the loops, 5 after; a branch forward and the one at the end, to itself, are no loops, and NOP is nothing;
        # 5 in the outer loop, which two branches go back to; 3 in the inner one
        "issued": [8, 5, 3],
        # a quarter of 64×32×8 in HGMMA's own way; of 16×8×16, and a quarter of 64×64×16
        "tensor_flops": [2 * 64 * 32 * 8 // 4, 2 * 16 * 8 * 16 + 2 * 64 * 64 * 16 // 4, 0],
        "fp32_flops": [0, 0, 32 * (2 + 1)],
        "accessed": [32 * (16 + 8), 32 * 2, 0],
    }


def test_a_kernel_without_loops_has_one_depth():
    assert work("        /*0000*/                   EXIT ;\n")["issued"] == [1]
