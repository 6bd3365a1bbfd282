"""The README's first example, as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ncsr_fast.data import read_image

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example(tmp_path, monkeypatch, capsys):
    """On a photograph that it finds as photo.png."""
    data = pytest.importorskip("skimage.data")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.chelsea()).resize((57, 38), Image.Resampling.BICUBIC).save("photo.png")
    torch.manual_seed(0)
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(compile(block, str(README), "exec"), names)
    sr = names["sr"]
    assert sr.shape == (1, 10, 3, 152, 228) and sr.isfinite().all()
    printed = re.fullmatch(r"\(1, 10, 3, 152, 228\), deviation between samples (0\.\d{3})\n", capsys.readouterr().out)
    assert 0.005 < float(printed[1]) < 0.1, "different samples of one picture"
    for index in range(10):
        written = read_image(f"large_{index}.png")
        assert torch.equal(written, (255 * sr[0, index]).round().byte())
