"""Models held to recorded vectors: the tolerances, and gradients by their published names."""

from __future__ import annotations

import copy

import pytest
import torch

from ncsr_fast import NCSR
from ncsr_fast.checkpoints.published import layout

# The README of the vectors: float64 values to 1e-6 (large arrays are stored as float32), gradients to 2e-6; float32
# values to 2e-5. Gradients are held in float64, where a ReLU does not flip.
VALUE = {torch.float64: 1e-6, torch.float32: 2e-5}
GRADIENT = 2e-6
every_dtype = pytest.mark.parametrize("dtype", VALUE, ids=["float64", "float32"], scope="module")


def published_gradients(model: NCSR) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that has one, by published name: exported from a model that has it as weights."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for weight, parameter in zip(holder.parameters(), model.parameters()):
            weight.copy_(torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad)
    exported, unused = holder.published_state_dict(), unused_names(model)
    return {key: value for key, value in exported.items() if key not in unused and not value.isnan().any()}


def unused_names(model: NCSR) -> set[str]:
    """Published tensors no computation of ours reads."""
    return {entry.name for entry in layout(model) if entry.tensor is None}
