"""A model whose weights will not change: what is made of them is made once, and every way to change them is refused."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ncsr_fast.engine.cache import place
from ncsr_fast.layout import traced

if TYPE_CHECKING:
    from ncsr_fast.nn.ncsr import NCSR


class FrozenError(RuntimeError):
    """The weights of a frozen model were changed, or would have been."""


class Freezing:
    """The part of `NCSR` that freezes it."""

    _record: _Record | None = None  # of the weights as they were frozen

    @property
    def frozen(self) -> bool:
        """Whether `freeze_for_inference` was called, and `unfreeze` not since."""
        return self._record is not None

    def freeze_for_inference(self: NCSR) -> NCSR:
        """Promise that the weights no longer change; returns the model itself, in evaluation mode and without gradients.

        Actnorms, exp-scales and the inverses of the 1×1 convolutions are folded into constants now, and kept. Without the
        promise a GPU folds anew in every pass, and a CPU compares a checksum of all weights. `encode`, `nll`, `decode` and
        `sample` record no gradients, the images' neither. Gradients that parameters hold are dropped, so that an optimizer
        finds nothing to do. `.to()`, `.cuda()`, `.double()` and the options of the engine work as before, and fold anew
        where they must.

        Until `unfreeze`, all that would change a weight raises FrozenError: `load_state_dict`, `load_published`,
        `initialize`, `train()` and `requires_grad_()` before they do anything, and edits in place or a parameter put in
        another's place at the next pass, whose images would be stale. Two ways past PyTorch's count of changes cannot be
        seen: edits of a parameter's `.data` in place, and the replay of a CUDA graph of training steps captured before.

        A frozen model is frozen anew by another call. A copy or a pickle of it is not frozen, and has its gradients off.

        raises  ValueError for a 1×1 convolution without an inverse (of a model on the CPU), or for weights made under
                `torch.inference_mode()`, of which PyTorch counts no changes
        """
        self.unfreeze()
        if any(parameter.is_inference() for parameter in self.parameters()):
            raise ValueError(
                "the model was made under torch.inference_mode(), where changes of its weights are not counted; make it outside"
            )
        training, flags = self.training, [parameter.requires_grad for parameter in self.parameters()]
        self.eval().requires_grad_(False)
        for parameter in self.parameters():
            parameter.grad = None
        for level in self.levels:
            level.cache.freeze()
        self._record = _Record(self, training, flags)
        try:
            with torch.inference_mode(False):
                _visit(self)  # what it needs is folded here and not in the first pass
        except BaseException:
            self.unfreeze()
            raise
        return self

    def unfreeze(self: NCSR) -> NCSR:
        """Take the promise back: mode and gradients are what they were. Nothing happens to a model that is not frozen."""
        record, self._record = self._record, None
        if record is None:
            return self
        for level in self.levels:
            level.cache.thaw()
        for parameter, flag in zip(record.parameters, record.flags):
            parameter.requires_grad_(flag)
        return self.train(record.training)

    @property
    def folded_constants(self: NCSR) -> list[dict]:
        """The constants of every level that were folded when the model was frozen; none for a model that is not."""
        return [constants for level in self.levels if (constants := level.cache.frozen_values) is not None]

    def refuse_when_frozen(self, what: str) -> None:
        """Raise FrozenError when the model is frozen."""
        if self.frozen:
            raise FrozenError(f"{what} would change the weights of a frozen model; call model.unfreeze() first")

    def check_frozen(self) -> None:
        """Raise FrozenError when the model is frozen and a weight was changed since. Never waits for the device."""
        if self._record is not None and not traced():  # a traced graph folds what weights it is given
            self._record.check(self)

    def recording(self) -> contextlib.AbstractContextManager:
        """Inside, a frozen model records no gradients; one that is not frozen as the caller has it."""
        return torch.no_grad() if self.frozen else contextlib.nullcontext()

    # -- what nn.Module has ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.refuse_when_frozen("train()")
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            self.refuse_when_frozen("requires_grad_()")
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self.refuse_when_frozen("load_state_dict()")
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> Any:  # what to(), cuda(), double() … do
        if not self.frozen:
            return super()._apply(*arguments, **options)
        self.check_frozen()
        record = self._record
        self.unfreeze()
        super()._apply(*arguments, **options)
        self.freeze_for_inference()
        self._record.training, self._record.flags = record.training, record.flags
        return self


class _Record:
    """The weights at the time of freezing, and what unfreezing restores."""

    def __init__(self, model: nn.Module, training: bool, flags: list[bool]) -> None:
        self.training, self.flags = training, flags
        self.parameters = list(model.parameters())
        self.states = [_state(parameter) for parameter in self.parameters]

    def check(self, model: nn.Module) -> None:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            same = index < len(self.parameters) and parameter is self.parameters[index]
            if not same or _state(parameter) != self.states[index]:
                raise FrozenError(
                    f"{name} was changed since model.freeze_for_inference(), and what was folded is stale: call "
                    "model.unfreeze() before weights change, or model.freeze_for_inference() again to take them as they are"
                )

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy has other weights, and is not frozen


def _state(parameter: Tensor) -> tuple:
    return *place(parameter), parameter.requires_grad


def _visit(model: NCSR) -> None:
    """Decode and encode an image as small as there is."""
    like = model.levels[0].actnorm_bias
    lr = like.new_zeros(1, 3, 2, 2)
    latents = [like.new_zeros(1, *shape) for shape in model.latent_shapes(2, 2)]
    hr = model.decode(latents, lr)
    model.encode(torch.zeros_like(hr), lr)
