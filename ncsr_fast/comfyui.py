"""A node of ComfyUI: samples of a flow. Link or copy this file into ComfyUI's folder custom_nodes, under any name.

ComfyUI's Python needs the package. The node draws several images of each, at a temperature and by a seed, in tiles that leave
no seams. Where spandrel is installed, as ComfyUI installs it, "Load Upscale Model" loads the family's files as well
(`ncsr_fast.spandrel.install`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import ncsr_fast.spandrel
from ncsr_fast.cli._common import DEFAULT_MODEL, pick_device
from ncsr_fast.model import NCSR
from ncsr_fast.photographs import sample_photograph

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_LAST_SEED = 2**64 - 1


class FlowSamples:
    """The node: images (B·n, sH, sW, C) of images (B, H, W, C), both float in [0, 1]; the n of the first image come first."""

    CATEGORY = "image/upscaling"
    DESCRIPTION = "Samples of a conditional flow: several sharp images that all fit the image given."
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[str, dict[str, Any]]]]:  # noqa: N802 - ComfyUI's name
        """The sockets and widgets, in the order of `sample`'s arguments."""
        temperature = "standard deviation of the latents: 0 is one smooth image, 1 the detail of the flow's own distribution"
        return {
            "required": {
                "image": ("IMAGE", {}),
                "model": ("STRING", {"default": DEFAULT_MODEL, "tooltip": "a shipped model's name, a directory, or a file"}),
                "n": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "images of each image"}),
                "temperature": (
                    "FLOAT",
                    {"default": 0.8, "min": 0.0, "max": 2.0, "step": 0.05, "round": 0.001, "tooltip": temperature},
                ),
                "seed": ("INT", {"default": 0, "min": 0, "max": _LAST_SEED, "control_after_generate": True}),
                "tile": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 16384,
                        "tooltip": "pixels of the image a side of the tiles, which leave no seams; 0: as the memory allows",
                    },
                ),
            }
        }

    def sample(self, image: Tensor, model: str, n: int, temperature: float, seed: int, tile: int) -> tuple[Tensor]:
        """The node's output, on the CPU: of each image the samples that `ncsr-fast sample` draws with the same seed."""
        flow = _loaded(model, pick_device("auto"))
        like = next(flow.parameters())
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "tile": tile or "auto"}
        photos = image.movedim(-1, 1).to(like)
        samples = torch.cat([sample_photograph(flow, photo, n, **options).cpu() for photo in photos])
        return (samples.movedim(1, -1).contiguous().to(image.dtype),)


@lru_cache(maxsize=1)
def _loaded(model: str, device: str) -> NCSR:
    """The model last used is held for the next images."""
    return NCSR.from_pretrained(model).to(device).eval()


def _install() -> None:
    """Register the family in spandrel, where that is installed."""
    try:
        ncsr_fast.spandrel.install()
    except ImportError as error:
        print(f"ncsr_fast: only the node, no models for Load Upscale Model: {error}")


NODE_CLASS_MAPPINGS = {"NCSRFastSamples": FlowSamples}
NODE_DISPLAY_NAME_MAPPINGS = {"NCSRFastSamples": "Flow Samples (NCSR)"}
_install()
