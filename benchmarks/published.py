"""The published NCSR program, from a checkout of its repository, behind the methods the benchmark calls."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ncsr_fast import NCSR, NCSRConfig, accelerate

from .harness import differentiated

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
NOT_NEEDED = ("cv2", "yaml", "torchvision", "torchvision.utils", "natsort", "imageio")  # what is not installed of it


TRAIN = {  # and the part that decides a training step; what is left out reads as None
    "lr_G": 2e-4, "weight_decay_G": 0, "beta1": 0.9, "beta2": 0.99, "lr_scheme": "MultiStepLR", "lr_steps": [10**6],
    "lr_gamma": 0.5, "restarts": None, "restart_weights": None, "clear_state": None, "niter": 10**6,
}  # fmt: skip


def _importable(checkout: Path) -> None:
    sys.path.insert(0, str(checkout / "code"))
    for name in NOT_NEEDED:
        try:
            __import__(name)
        except (ImportError, RuntimeError):
            sys.modules[name] = mock.MagicMock()


class PublishedTrainer:
    """Its training program's parts: the data set of a folder of PNG files, `feed_data` and `optimize_parameters`.

    Its model class cannot be built without a GPU, so it is filled in by hand; its steps are its own. Needs natsort, imageio.
    """

    def __init__(self, checkout: Path, device: str, batch: int, crop: int, max_std: float) -> None:
        _importable(checkout)
        from data.LRHR_IMG_dataset import LRHR_IMGDataset
        from models.modules.NCSRNet_arch import NCSRNet
        from models.NCSR_model import NCSRModel

        self._dataset, self.batch, self.crop = LRHR_IMGDataset, batch, crop
        self.model = object.__new__(NCSRModel)
        network = NCSRNet(3, 3, 64, 23, gc=32, scale=4, K=16, opt=OPTIONS).to(device)
        state = {
            "opt": {**OPTIONS, "train": TRAIN}, "device": torch.device(device), "netG": torch.nn.DataParallel(network),
            "max_std": max_std, "LRnoise": True, "scale": 4, "mode": "softflow", "std_channels": 3, "optimizers": [],
            "schedulers": [], "is_train": True,
        }  # fmt: skip
        self.model.__dict__.update(state)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model.init_optimizer_and_scheduler(TRAIN)

    def loader(self, folder: Path, workers: int) -> DataLoader:
        """As its `create_dataloader` makes it."""
        options = {"dataroot_GT": str(folder), "dataroot_y_labels": None, "GT_size": self.crop, "scale": 4, "use_flip": True}
        return DataLoader(self._dataset(options), self.batch, shuffle=True, num_workers=workers, drop_last=True)

    def step(self, batch: dict[str, Tensor]) -> float:
        self.model.feed_data(batch)
        return self.model.optimize_parameters(1)


class PublishedNCSR:
    """Its ×4 network with the given weights; `accelerated` by the one line of ours.

    Its hidden layers are 64 wide, whatever `options` say; those of a stand-in may be narrower. `holder` is a model of ours of
    the same architecture, whose weights are not its own.
    """

    def __init__(
        self, checkout: Path, state: dict[str, Tensor], device: str, accelerated: bool = False, options: dict = OPTIONS
    ) -> None:
        _importable(checkout)
        from models.modules.NCSRNet_arch import NCSRNet

        config = NCSRConfig.from_published(options)
        self.network = NCSRNet(
            3, 3, config.channels, config.blocks, gc=config.growth, scale=config.scale, K=config.steps, opt=options
        ).eval()
        self.network.load_state_dict(state)
        self.network.to(device)
        if accelerated:
            accelerate(self.network)
        self.holder = NCSR(config)

    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    def train_encoder(self, wanted: bool) -> None:
        self.network.RRDB.requires_grad_(wanted)

    def train_flow(self, wanted: bool) -> None:
        for name, parameter in self.network.named_parameters():
            if not name.startswith("RRDB."):
                parameter.requires_grad_(wanted)

    def gradient(self) -> Tensor:
        """As one vector, in the order of our parameters: taken for the weights of a model of ours."""
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.network.named_parameters()}
        with torch.no_grad():
            self.holder.load_published(gradients)
        return torch.cat([parameter.detach().flatten() for parameter in self.holder.parameters()])

    def loss_and_gradients(self, hr: Tensor, lr: Tensor, noise: Tensor) -> Tensor:
        """The loss, as its trainer forms it, and the gradients of its parameters in place of those there were."""
        for parameter in self.network.parameters():
            parameter.grad = None
        loss = self.network(gt=hr, lr=lr, reverse=False, std=noise, add_gt_noise=False)[1].mean()
        loss.backward()
        return loss.detach()

    def decode(self, latents: list[Tensor], lr: Tensor) -> Tensor:
        std = torch.zeros(1, 1, 1, 1, device=lr.device)
        recorded = torch.is_grad_enabled()
        return self.network(lr=lr, z=None, epses=list(latents), reverse=True, reverse_with_grad=recorded, std=std)[0]

    def decode_and_differentiate(self, latents: list[Tensor], lr: Tensor) -> tuple[Tensor, Tensor]:
        return differentiated(lambda leaves: self.decode(leaves, lr), latents)

    def sample(self, lr: Tensor, n: int, temperature: float) -> None:
        """As its test program does: the encoder anew for every sample, split latents drawn inside. Of another image every
        time, as an accelerated network knows the last one."""
        lr, size = torch.rand_like(lr), [side // 2 for side in lr.shape[2:]]
        for _ in range(n):
            z = temperature * torch.randn(1, 96, *size, device=lr.device)
            std = torch.zeros(1, 1, 1, 1, device=lr.device)
            self.network(lr=lr, z=z, eps_std=temperature, reverse=True, std=std)
