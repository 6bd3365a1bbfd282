"""Models of the family of published flows, from what their programs read and write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ncsr_fast.checkpoints.state_dicts import read_state_dict
from ncsr_fast.config import NCSRConfig
from ncsr_fast.files import adopt_dtype
from ncsr_fast.model import NCSR


def from_published(
    options: Mapping[str, Any], state_dict: Mapping[str, Tensor] | str | os.PathLike | None = None, **engine: Any
) -> NCSR:
    """The model that a published YAML describes: NCSR, SRFlow, FS-NCSR, SRFlow-DA and its variants, LLFlow or CTFlow.

    Args:
        options: The YAML, as the dict a reader of YAML returns.
        state_dict: Published weights, of whose dtype the model is: a state dict, or the .pth or .safetensors file that holds
            one. None: the model has initial weights.
        engine: Options of `EngineOptions`.

    Raises:
        ValueError: The options ask for what is not served; the message names it, and the nearest that is.
        CheckpointError: The weights are those of another model; the message names the first tensors that differ and the system
            whose they look like.

    Example:
        >>> options = yaml.safe_load(open("LOL_smallNet.yml"))
        >>> model = ncsr_fast.from_published(options, "smallNet.pth")
    """
    model = NCSR(NCSRConfig.from_published(options), **engine)
    if state_dict is not None:
        state = read_state_dict(state_dict)
        adopt_dtype(model, state)
        model.load_published(state)
    return model
