"""The family's models in spandrel, the library through which ComfyUI, chaiNNer and other programs load super-resolution models.

Example:
    >>> import ncsr_fast.spandrel, spandrel
    >>> ncsr_fast.spandrel.install()
    >>> upscaler = spandrel.ModelLoader().load_from_file("NCSR_4X.pth")
    >>> image = upscaler(lr)  # (1, 3, H, W) → (1, 3, 4H, 4W), both in [0, 1]
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ncsr_fast.checkpoints.models import is_own, model_of_state_dict
from ncsr_fast.checkpoints.recognition import recognised_system
from ncsr_fast.checkpoints.state_dicts import read_state_dict
from ncsr_fast.config import NCSRConfig
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import is_low_light, sample_photograph

if TYPE_CHECKING:
    from spandrel import Architecture, ArchRegistry, ImageModelDescriptor

ID = "NCSR"  # of the architecture in spandrel's registries


class Upscaler(nn.Module):
    """One image of each photograph, the same every time: the module in spandrel's descriptors of models of the family.

    Args:
        model: The model.
        temperature: Standard deviation of the latents, an attribute that can be set at any time, as the following two: 0, the
            image of latents that are zero, unless it is given.
        seed: Of the latents.
        tile: As for `NCSR.sample`.

    Example:
        >>> upscaler.model.temperature, upscaler.model.seed = 0.8, 7  # of a descriptor `upscaler`
    """

    def __init__(self, model: NCSR, temperature: float = 0.0, seed: int = 0, tile: int | str | None = "auto") -> None:
        super().__init__()
        self.model, self.temperature, self.seed, self.tile = model, temperature, seed, tile

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, C, sH, sW) in [0, 1] of photographs (B, C, H, W) in [0, 1]; each is what it is in a batch of its own."""
        options = {"temperature": self.temperature, "seed": self.seed, "tile": self.tile}
        return torch.cat([sample_photograph(self.model, each, **options) for each in image])


def install(registry: ArchRegistry | None = None) -> None:
    """Register the family's models in a registry of spandrel; a second time does nothing.

    Afterwards spandrel loads NCSR, SRFlow, SRFlow-DA, CTFlow and LLFlow in the configurations of the presets
    (`ncsr_fast.systems.PRESETS`): files of the published programs, and model.safetensors of this package. A state dict does not
    say which blocks of the encoder are stacked, or that it is FS-NCSR's instead of NCSR's: for models that differ from a preset
    in such a thing use `load`.

    Args:
        registry: None: spandrel.MAIN_REGISTRY, in which every `ModelLoader` searches by default.

    Raises:
        ImportError: spandrel is not installed, or does not run.
    """
    spandrel = _package()
    support = spandrel.ArchSupport.from_architecture(_architecture())
    (spandrel.MAIN_REGISTRY if registry is None else registry).add(support, ignore_duplicates=True)


def load(path: str | os.PathLike, config: NCSRConfig | None = None) -> ImageModelDescriptor[Upscaler]:
    """The descriptor of whatever `NCSR.from_pretrained` reads: a directory, a file of any configuration, a name.

    Args:
        path: As for `NCSR.from_pretrained`.
        config: Of a file that fits no preset, or fits the wrong one.

    Raises:
        ImportError: As `install` does.
        FileNotFoundError, CheckpointError: As `NCSR.from_pretrained` does.
    """
    return _descriptor(_architecture(), NCSR.from_pretrained(path, config))


def recognises(state: Mapping[str, Any]) -> bool:
    """True for a state dict of a flow of the family, published or of this package."""
    return is_own(state) or recognised_system({name: getattr(value, "shape", ()) for name, value in state.items()}) is not None


def _package() -> Any:
    try:
        import spandrel
    except ImportError as error:
        raise ImportError(f"spandrel cannot be imported ({error}): pip install 'ncsr_fast[spandrel]'") from error
    except RuntimeError as error:
        raise ImportError(f"spandrel needs a torchvision that fits torch {torch.__version__}: {error}") from error
    return spandrel


@cache
def _architecture() -> Architecture[Upscaler]:
    spandrel = _package()

    class FlowArchitecture(spandrel.Architecture):
        def __init__(self) -> None:
            super().__init__(id=ID, name="NCSR, SRFlow and their family", detect=recognises)

        def load(self, state_dict: Mapping[str, Tensor]) -> ImageModelDescriptor[Upscaler]:
            return _descriptor(self, model_of_state_dict(NCSR, read_state_dict(state_dict), None, None))

    return FlowArchitecture()


def _descriptor(architecture: Architecture[Upscaler], model: NCSR) -> ImageModelDescriptor[Upscaler]:
    spandrel, module, flow = _package(), Upscaler(model).eval(), model.flow
    return spandrel.ImageModelDescriptor(
        module,
        module.state_dict(),
        architecture=architecture,
        purpose="SR" if flow.scale > 1 else "Restoration",
        tags=model.describe().split(", "),
        supports_half=True,
        supports_bfloat16=True,
        scale=flow.scale,
        input_channels=flow.channels if is_low_light(model) else flow.lr_channels,
        output_channels=flow.channels,
        tiling=spandrel.ModelTiling.INTERNAL,
    )
