"""The arguments of the published networks' forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ncsr_fast.compat.replacement import Unsupported
from ncsr_fast.config import NCSRConfig


@dataclass
class Call:
    """The arguments of the forward of SRFlow, SRFlow-DA and CTFlow."""

    gt: Tensor | None = None
    lr: Tensor | None = None
    z: Tensor | None = None
    eps_std: float | None = None
    reverse: bool = False
    epses: Any = None
    reverse_with_grad: bool = False
    lr_enc: Mapping[str, Tensor] | None = None
    add_gt_noise: bool = False
    step: Any = None  # ignored, as in the published networks
    y_label: Any = None

    std = None  # an argument of NCSR alone

    @classmethod
    def of(cls, *arguments: Any, **options: Any) -> Call:
        """The call with these arguments; raise Unsupported for others, about which the network itself raises an error."""
        try:
            return cls(*arguments, **options)
        except TypeError as error:
            raise Unsupported(f"its arguments are others: {error}") from error

    @classmethod
    def names(cls) -> list[str]:
        """The names of the arguments, in order."""
        return [field.name for field in fields(cls)]

    def check(self) -> None:
        """Raise Unsupported if an argument asks for what the published programs never do."""
        if self.y_label is not None:
            raise Unsupported("y_label is given")


@dataclass
class NoiseCall(Call):
    """The arguments of the forward of NCSR and FS-NCSR."""

    std: Tensor | None = None


@dataclass
class LowLightCall(Call):
    """The arguments of the forward of LLFlow."""

    align_condition_feature: bool = False
    get_color_map: bool = False

    def check(self) -> None:
        """Raise Unsupported if an argument asks for what the published programs never do."""
        super().check()
        for name in ("align_condition_feature", "get_color_map"):
            if getattr(self, name):
                raise Unsupported(f"{name} is given")


def call_of(config: NCSRConfig) -> type[Call]:
    """The kind of the calls of a network."""
    if config.traits.encoder == "low light":
        return LowLightCall
    return NoiseCall if config.noise_channels else Call
