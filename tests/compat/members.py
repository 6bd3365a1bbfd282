"""The members of the family that the drop-in is tested with: stand-ins, and published networks where a checkout is named."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from compat import family
from compat.networks import published_class
from support import image, randomize

import ncsr_fast
from ncsr_fast.compat.accelerate import AccelerationReport


class PublishedOptions(dict):
    """Options as the published programs read them: what is missing is None."""

    def __missing__(self, key: str) -> None:
        return None


@dataclass(frozen=True)
class Member:
    """A kind of network, small; `checkout` is the environment variable that names the real one, whose widths are fixed."""

    model: str
    scale: int = 4
    steps: int = 2
    checkout: str | None = None
    step: float = 0.01  # size of the random changes of parameters

    @property
    def name(self) -> str:
        return f"{'published-' if self.checkout else ''}{self.model}-x{self.scale}"

    @property
    def low_light(self) -> bool:
        return self.model == "LLFlow"

    @property
    def options(self) -> dict:
        published = self.checkout is not None
        levels = 3 if self.scale == 1 else 1 if self.model.endswith("-S") else self.scale.bit_length() - 1
        blocks, width = ([0, 1, 2, 3], 64) if self.scale > 1 else ([0, 1], 64 if published else 4)
        flow = {
            "K": self.steps,
            "L": levels,
            "coupling": "CondAffineSeparatedAndCond",
            "additionalFlowNoAffine": 2,
            "fea_up0": True,
            "stackRRDB": {"blocks": blocks, "concat": True},
            "split": {"enable": not self.low_light},
            "CondAffineSeparatedAndCond": {"hidden_channels": 64 if published else 4},
        }
        channels = 1 if self.model == "SRFlow" else 3
        network = {"which_model_G": "SRFlowNet", "nf": width, "gc": 32 if published else 2, "nb": len(blocks)}
        options = {"model": self.model, "scale": self.scale, "datasets": {"train": {"quant": 32, "GT_size": 160}}}
        if self.model == "SRFlow":
            flow |= {"split": {"enable": True, "correct_splits": True}, "fea_up-1": True, "fea_up-2": True}
        if self.low_light:
            width = network["nf"] = 32 if published else 4
            flow |= {"conditionInFeaDim": width * 3}
            network["which_model_G"] = "LLFlow"
            options |= {"cond_encoder": "ConEncoder1", "concat_histeq": True, "train_gt_ratio": 0.5, "align_maxpool": True}
        options["network_G"] = {**network, "in_nc": channels, "out_nc": channels, "flow": flow}
        return nested(options)

    def fresh(self) -> torch.nn.Module:
        """With its actnorms not initialised."""
        torch.manual_seed(0)
        options = self.options
        network = options["network_G"]
        if self.checkout is None:
            return (family.LLFlow if self.low_light else family.SRFlowNet)(options)
        build = published_class(network["which_model_G"], self.checkout)
        arguments = network["in_nc"], network["out_nc"], network["nf"], network["nb"]
        return build(*arguments, gc=32, scale=self.scale, K=network["flow"]["K"], opt=options)

    def build(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        """In evaluation mode, every parameter moved off its initial value."""
        return randomize(self.fresh().double(), amount=self.step if dtype == torch.float64 else self.step / 4).to(dtype).eval()

    def images(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, torch.Tensor]:
        """The arguments of a training step: images whose sides differ."""
        height, width = (16, 24) if self.scale == 1 else (8, 10)
        network = self.options["network_G"]
        lr = image(2, 6 if self.low_light else network["in_nc"], height, width, seed=seed, dtype=dtype)
        gt = image(2, network["out_nc"], self.scale * height, self.scale * width, seed=seed + 1, dtype=dtype)
        return {"lr": lr, "gt": gt}


def nested(options: dict) -> PublishedOptions:
    return PublishedOptions({key: nested(value) if isinstance(value, dict) else value for key, value in options.items()})


DA, CT, LL = Member("SRFlow-DA"), Member("SRFlow", scale=1), Member("LLFlow", scale=1)
STAND_INS = [
    DA,
    Member("SRFlow-DA-R"),
    Member("SRFlow-DA-D", steps=1, step=0.001),
    Member("SRFlow-DA-S", steps=8),
    Member("SRFlow-DA", scale=8),
    CT,
    LL,
]
_VARIABLES = {"SRFlow": "NCSR_PUBLISHED_CTFLOW", "LLFlow": "NCSR_PUBLISHED_LLFLOW"}
PUBLISHED = [
    Member(each.model, each.scale, each.steps, _VARIABLES.get(each.model, "NCSR_PUBLISHED_SRFLOW_DA"), each.step / 10)
    for each in STAND_INS
]


@functools.cache
def _accelerated(member: Member, dtype: torch.dtype) -> tuple:
    net = member.build(dtype)
    untouched = copy.deepcopy(net)
    return net, untouched, ncsr_fast.accelerate(net)


def accelerated_twins(
    member: Member, dtype: torch.dtype = torch.float64
) -> tuple[torch.nn.Module, torch.nn.Module, AccelerationReport]:
    """The same network accelerated as a whole, and untouched, and the report: copies of what is made once."""
    found = copy.deepcopy(_accelerated(member, dtype))
    assert list(found[2].replaced) == [""], found[2]
    return found
