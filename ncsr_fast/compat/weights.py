"""The parameters of a published network, stacked as in this package's model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.compat.replacement import Unsupported
from ncsr_fast.compat.structure import entries_of
from ncsr_fast.engine.cache import fingerprint
from ncsr_fast.model import NCSR


class Slot(NamedTuple):
    """A parameter of this package's model, and the published parameters it consists of."""

    module: str  # the module with the parameter
    name: str
    shape: torch.Size
    sources: slice  # its published parameters among all of them


class StackedWeights:
    """The map from the parameters of a published network to those of this package's model.

    It is made from `ncsr_fast.checkpoints.published.layout`, whose entries are views of the model's parameters.
    """

    def __init__(self, skeleton: NCSR, net: nn.Module) -> None:
        pieces: dict[int, list[tuple[int, str]]] = {}  # by the memory of a parameter: (position in it, published name)
        for entry in entries_of(skeleton):
            if entry.tensor is not None:
                key = entry.tensor.untyped_storage()._cdata
                pieces.setdefault(key, []).append((entry.tensor.storage_offset(), entry.name))
        self._sources: list[tuple[nn.Module, str]] = []
        self.slots: list[Slot] = []
        for path, module in skeleton.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                first = len(self._sources)
                for _, published in sorted(pieces[parameter.untyped_storage()._cdata]):
                    owner, _, attribute = published.rpartition(".")
                    self._sources.append((net.get_submodule(owner), attribute))
                self.slots.append(Slot(path, name, parameter.shape, slice(first, len(self._sources))))
        self.modules = list(dict.fromkeys(module for module, _ in self._sources))

    def read(self) -> list[Tensor]:
        """The current published parameters; raise Unsupported unless they are ordinary tensors of one dtype and device."""
        tensors = [getattr(module, name) for module, name in self._sources]
        dtype, device = tensors[0].dtype, tensors[0].device
        if dtype not in (torch.float32, torch.float64) or device.type == "meta":
            raise Unsupported(f"its parameters are {dtype} on {device}")
        if any(tensor.dtype != dtype or tensor.device != device for tensor in tensors):
            raise Unsupported("its parameters are not all of one dtype and device")
        if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            raise Unsupported("its parameters are not ordinary tensors")
        return tensors


class Vessel:
    """A model without weights, to be filled with the weights of a call."""

    def __init__(self, skeleton: NCSR, slots: list[Slot]) -> None:
        self.model, self._slots = copy.deepcopy(skeleton), slots
        self._modules = [self.model.get_submodule(slot.module) for slot in slots]
        self._empty = [module._parameters[slot.name] for module, slot in zip(self._modules, slots)]

    def fill(self, tensors: list[Tensor]) -> None:
        """Stack the tensors read by `StackedWeights`, differentiably."""
        for module, slot in zip(self._modules, self._slots):
            parts = tensors[slot.sources]
            whole = parts[0] if len(parts) == 1 else torch.stack(parts)
            module._parameters[slot.name] = whole.reshape(slot.shape)

    def clear(self) -> None:
        for module, slot, empty in zip(self._modules, self._slots, self._empty):
            module._parameters[slot.name] = empty


def state_of(tensors: Iterable[Tensor]) -> object | None:
    """A value that is equal for two lists of parameters only if none changed; None if changes cannot be noticed."""
    tensors = list(tensors)
    return None if any(tensor.is_inference() for tensor in tensors) else fingerprint(tensors)
