"""A flow that nobody wrote code for, with an encoder of its own; and networks that the engine has no kernels for."""

from __future__ import annotations

import torch
from support import randomize
from torch import nn

from ncsr_fast import NCSR
from ncsr_fast.config import Branch, FlowConfig, LevelConfig
from ncsr_fast.engine.condition import Condition, Features
from ncsr_fast.flow.networks import StackedNetworks
from ncsr_fast.ops.conv3x3 import convolution


class Encoder(nn.Module):
    """Features of the two levels, of a scale of 2, and the mean of the prior."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)

    def condition(self, lr, method):
        u = convolution(lr, self.first.weight, self.first.bias, method)
        mean = convolution(nn.functional.avg_pool2d(lr, 2), self.second.weight, self.second.bias, method)
        return Condition([Features(u), Features(nn.functional.avg_pool2d(u, 2))], mean.repeat(1, 2, 1, 1))


NOISY = Branch("noisy", "noise", steps=1)
BRANCHES = (Branch("plain", None), Branch("injectors", changes_all=True), NOISY)
FLOW = FlowConfig(
    scale=2,
    levels=(LevelConfig(2, 5, BRANCHES, split_channels=6), LevelConfig(2, 5, BRANCHES[::-1], transition_steps=1)),
    hidden_channels=4,
    noise_channels=3,
    prior="encoder",
    base="bicubic",
)


class OwnNetworks(nn.Module):
    """Networks of another kind than the engine has kernels for."""

    def __init__(self, networks: StackedNetworks):
        super().__init__()
        self.networks = networks

    def unbind(self) -> list:
        return self.networks.unbind()


def model_of(config: FlowConfig = FLOW, **options) -> NCSR:
    torch.manual_seed(0)
    return randomize(NCSR(config, Encoder(), **options)).double()
