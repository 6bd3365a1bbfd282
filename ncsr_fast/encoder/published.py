"""The encoder of a published architecture."""

from __future__ import annotations

from torch import nn

from ncsr_fast.config import FlowConfig, NCSRConfig
from ncsr_fast.encoder.low_light import LowLightEncoder
from ncsr_fast.encoder.rrdb import RRDB


def published_encoder(config: NCSRConfig | FlowConfig) -> nn.Module:
    """The encoder that a configuration describes, without gradients of what the flow does not use: its loss gives it none.

    Raises:
        ValueError: The configuration is that of a flow alone.
    """
    if not isinstance(config, NCSRConfig):
        raise ValueError("a model of a FlowConfig needs an encoder: NCSR(config, encoder)")
    sizes = config.channels, config.growth, config.blocks, config.stacked_blocks
    traits = config.traits
    if traits.encoder == "low light":
        return LowLightEncoder(*sizes)
    encoder = RRDB(
        max(config.scale, 4),  # the files of scale 1 are those of a ×4 generator
        *sizes,
        long_skip="last_block",
        in_channels=traits.lr_channels,
        out_channels=traits.channels,
        level_scales=config.flow.level_scales(),
    )
    for module in encoder.head():
        module.requires_grad_(False)
    return encoder
