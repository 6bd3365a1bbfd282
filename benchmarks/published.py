"""The published NCSR program, from a checkout of its repository, behind the methods the benchmark calls."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from ncsr_fast import NCSR, NCSRConfig

OPTIONS = {  # the part of the published 4X.yml that decides the architecture
    "scale": 4,
    "mode": "softflow",
    "network_G": {
        "which_model_G": "NCSRNet",
        "flow": {
            "K": 16, "L": 3, "S": [0, 16, 16], "std_channels": 3, "coupling": "CondAffineSeparatedAndCond",
            "additionalFlowNoAffine": 2, "split": {"enable": True}, "fea_up0": True,
            "stackRRDB": {"blocks": [1, 8, 15, 22], "concat": True},
        },
    },
}  # fmt: skip
_NOT_NEEDED = ("cv2", "natsort", "yaml", "torchvision", "torchvision.utils")  # its utilities import them, a network does not


class PublishedNCSR:
    """Its ×4 network with the given weights."""

    def __init__(self, checkout: Path, state: dict[str, Tensor], device: str) -> None:
        sys.path.insert(0, str(checkout / "code"))
        for name in _NOT_NEEDED:
            try:
                __import__(name)
            except (ImportError, RuntimeError):
                sys.modules[name] = mock.MagicMock()
        from models.modules.NCSRNet_arch import NCSRNet

        self.network = NCSRNet(3, 3, 64, 23, gc=32, scale=4, K=16, opt=OPTIONS).eval()
        self.network.load_state_dict(state)
        self.network.to(device)
        self._holder = NCSR(NCSRConfig.from_published(OPTIONS))

    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    def train_encoder(self, wanted: bool) -> None:
        self.network.RRDB.requires_grad_(wanted)

    def gradient(self) -> Tensor:
        """As one vector, in the order of our parameters: taken for the weights of a model of ours."""
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.network.named_parameters()}
        with torch.no_grad():
            self._holder.load_published(gradients)
        return torch.cat([parameter.detach().flatten() for parameter in self._holder.parameters()])

    def loss_and_gradients(self, hr: Tensor, lr: Tensor, noise: Tensor) -> Tensor:
        """The loss, as its trainer forms it, and the gradients of its parameters in place of those there were."""
        for parameter in self.network.parameters():
            parameter.grad = None
        loss = self.network(gt=hr, lr=lr, reverse=False, std=noise, add_gt_noise=False)[1].mean()
        loss.backward()
        return loss.detach()

    def decode(self, latents: list[Tensor], lr: Tensor) -> Tensor:
        std = torch.zeros(1, 1, 1, 1, device=lr.device)
        return self.network(lr=lr, z=None, epses=list(latents), reverse=True, std=std)[0]

    def sample(self, lr: Tensor, n: int, temperature: float) -> None:
        """As its test program does: the encoder anew for every sample, split latents drawn inside."""
        side = lr.shape[2] // 2
        for _ in range(n):
            z = temperature * torch.randn(1, 96, side, side, device=lr.device)
            std = torch.zeros(1, 1, 1, 1, device=lr.device)
            self.network(lr=lr, z=z, eps_std=temperature, reverse=True, std=std)
