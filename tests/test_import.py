"""`import ncsr_fast` needs torch alone, and offers what the interface promises."""

from __future__ import annotations

import pytest
from support import fresh_process

import ncsr_fast

BLOCKED = ("triton", "PIL", "safetensors", "tqdm", "skimage", "lpips", "ncsr_fast._native", "ncsr_fast.kernels")


@pytest.mark.slow
def test_import_and_model_without_anything_but_torch(tmp_path):
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # importing it raises
import torch, ncsr_fast
config = ncsr_fast.NCSRConfig(channels=4, growth=2, blocks=1, stacked_blocks=(0,), steps=1, hidden_channels=4)
model = ncsr_fast.NCSR(config)
print(tuple(model.sample(torch.rand(1, 3, 2, 2), n=2).shape), ncsr_fast.ops.backends()["reference"].available)
"""
    assert fresh_process(code, tmp_path) == "(1, 2, 3, 8, 8) True"


@pytest.mark.slow
def test_import_pulls_in_nothing_heavy(tmp_path):
    code = "import sys, torch; before = set(sys.modules); import ncsr_fast; print(*set(sys.modules) - before)"
    added = fresh_process(code, tmp_path).split()
    assert {name.split(".")[0] for name in added} == {"ncsr_fast"}
    assert not {f"ncsr_fast.{name}" for name in ("cli", "compat", "data", "metrics", "training")} & set(added)


def test_public_names():
    assert sorted(ncsr_fast.__all__) == sorted(
        [
            "NCSR", "NCSRConfig", "RRDB", "CheckpointError", "__version__", "accelerate", "data", "graphs", "metrics", "ops",
            "from_published", "restore", "training",
        ]
    )  # fmt: skip
    assert callable(ncsr_fast.accelerate) and callable(ncsr_fast.restore)
    assert callable(ncsr_fast.data.perturb) and callable(ncsr_fast.metrics.imresize)
    for name in ("encode", "nll", "decode", "sample", "initialize", "load_published", "published_state_dict"):
        assert callable(getattr(ncsr_fast.NCSR, name))
