"""What the tests of several subcommands need."""

from __future__ import annotations

import sys

import pytest
import torch
from support import image, randomize, tiny_model

from ncsr_fast import NCSR, NCSRConfig

PUBLISHED = """\
name: theirs
scale: 4
mode: softflow
std: 0.05
datasets: {train: {mode: LRHR_IMG, dataroot_GT: hr, batch_size: 2, GT_size: 32}}
network_G:
  which_model_G: NCSRNet
  train_RRDB_delay: 0.5
  flow: {K: 2, L: 3, S: [0, 2, 2], coupling: CondAffineSeparatedAndCond, fea_up0: true, split: {enable: true},
         stackRRDB: {blocks: [1], concat: true}}
train: {lr_G: 0.0002, lr_scheme: MultiStepLR, lr_gamma: 0.5, niter: 10}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny model."""
    return str(tiny_model(dtype=torch.float32).save_pretrained(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """A directory with a tiny model whose samples are well inside [0, 1]."""
    model = tiny_model(temperature=0.4)
    model.initialize(0.45 + 0.1 * image(4, 3, 64, 64, seed=8), image(4, 3, 16, 16, seed=9))
    return str(model.save_pretrained(tmp_path_factory.mktemp("settled")))


@pytest.fixture(scope="module")
def low_light_model(tmp_path_factory):
    """A directory with a tiny low-light model."""
    torch.manual_seed(0)
    sizes = {"channels": 4, "growth": 2, "blocks": 1, "stacked_blocks": (0,), "steps": 1, "hidden_channels": 4}
    model = randomize(NCSR(NCSRConfig(system="llflow", scale=1, **sizes)))
    return str(model.save_pretrained(tmp_path_factory.mktemp("low_light")))


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch):
    """Its weights would be a download."""
    monkeypatch.setitem(sys.modules, "lpips", None)


@pytest.fixture
def published_yaml():
    """The options of a published program."""
    return PUBLISHED
