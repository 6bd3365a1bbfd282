"""Frozen models: constants are folded once, and changes of the weights are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ncsr_fast.engine.cache import Cache, place
from ncsr_fast.layout import traced

if TYPE_CHECKING:
    from typing_extensions import Self


class FrozenError(RuntimeError):
    """The weights of a frozen model were changed, or a call would change them."""


class Freezer:
    """The promise that a model's weights do not change, and the state to restore when it is withdrawn.

    A copy or a pickle of a frozen model is not frozen.
    """

    def __init__(self) -> None:
        self._record: _Record | None = None

    @property
    def frozen(self) -> bool:
        """True from `freeze` to `thaw`."""
        return self._record is not None

    def freeze(self, model: nn.Module, caches: Sequence[Cache], fold: Callable[[], None]) -> None:
        """Freeze a model, in evaluation mode and without gradients.

        Args:
            model: The model.
            caches: The caches of values computed from its weights.
            fold: Function that computes these values, so that they are computed here and not in the first pass.

        Raises:
            ValueError: The weights were made under `torch.inference_mode()`, where PyTorch does not count changes.
        """
        self.thaw(model, caches)
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ValueError(
                "the model was made under torch.inference_mode(), where changes of its weights are not counted; make it outside"
            )
        training, flags = model.training, [parameter.requires_grad for parameter in model.parameters()]
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
        for cache in caches:
            cache.freeze()
        self._record = _Record(model, training, flags)
        try:
            with torch.inference_mode(False):
                fold()
        except BaseException:
            self.thaw(model, caches)
            raise

    def thaw(self, model: nn.Module, caches: Sequence[Cache]) -> None:
        """Restore mode and gradients; nothing happens to a model that is not frozen."""
        record, self._record = self._record, None
        if record is None:
            return
        for cache in caches:
            cache.thaw()
        for parameter, flag in zip(record.parameters, record.flags):
            parameter.requires_grad_(flag)
        model.train(record.training)

    def refuse(self, what: str) -> None:
        """Raise FrozenError if the model is frozen."""
        if self.frozen:
            raise FrozenError(f"{what} would change the weights of a frozen model; call model.unfreeze() first")

    def check(self, model: nn.Module) -> None:
        """Raise FrozenError if the model is frozen and a weight was changed since; never wait for the device."""
        if self._record is not None and not traced():  # a traced graph folds the weights that it receives
            self._record.check(model)

    def recording(self) -> contextlib.AbstractContextManager:
        """A context in which a frozen model records no gradients; other models record them as the caller has it."""
        return torch.no_grad() if self.frozen else contextlib.nullcontext()

    def move(self, model: nn.Module, caches: Sequence[Cache], move: Callable[[], object], fold: Callable[[], None]) -> None:
        """Run `move`, which moves or converts the weights of a model, and freeze a frozen model again."""
        record = self._record
        if record is None:
            move()
            return
        record.check(model)
        self.thaw(model, caches)
        move()
        self.freeze(model, caches, fold)
        assert self._record is not None
        self._record.training, self._record.flags = record.training, record.flags


class _Record:
    """The weights at the time of freezing, and the state that thawing restores."""

    def __init__(self, model: nn.Module, training: bool, flags: list[bool]) -> None:
        self.training, self.flags = training, flags
        self.parameters = list(model.parameters())
        self.states = [_state(parameter) for parameter in self.parameters]

    def check(self, model: nn.Module) -> None:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            same = index < len(self.parameters) and parameter is self.parameters[index]
            if not same or _state(parameter) != self.states[index]:
                raise FrozenError(
                    f"{name} was changed since model.freeze_for_inference(), so the folded constants are stale: call "
                    "model.unfreeze() before weights change, or model.freeze_for_inference() again to fold the new weights"
                )

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy has its own weights, and is not frozen


def _state(parameter: Tensor) -> tuple:
    return *place(parameter), parameter.requires_grad


class Freezable(nn.Module):
    """A module with the promise, whose weights the caches `_caches` hold folded values of."""

    def __init__(self) -> None:
        super().__init__()
        self._freezer = Freezer()

    @property
    def _caches(self) -> Sequence[Cache]:
        raise NotImplementedError

    def _visit(self) -> None:
        """Compute something by which all is folded that later calls need."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """True from `freeze_for_inference` to `unfreeze`."""
        return self._freezer.frozen

    def freeze_for_inference(self) -> Self:
        """Promise that the weights no longer change; returns the model itself, in evaluation mode and without gradients.

        Actnorms, exp-scales and the inverses of the 1×1 convolutions are folded into constants now, and cached. Without the
        promise a GPU folds in every pass, and a CPU compares a checksum of all weights. `encode`, `nll`, `decode` and `sample`
        record no gradients, the images' neither, and gradients that parameters hold are dropped. `.to()`, `.double()` and the
        options of the engine work as before, and fold again where they must.

        Until `unfreeze`, all that would change a weight raises FrozenError: `load_state_dict`, `load_published`,
        `initialize`, `train()` and `requires_grad_()` before they do anything; edits in place, or another parameter, at the
        next pass. Two ways past PyTorch's count of changes cannot be seen: edits of a parameter's `.data` in place, and the
        replay of a CUDA graph of training steps captured before. A copy or a pickle is not frozen, and has its gradients off.

        Raises:
            ValueError: A 1×1 convolution has no inverse (of a model on the CPU); or the weights were made under
                `torch.inference_mode()`, of which PyTorch counts no changes.
        """
        self._freezer.freeze(self, self._caches, self._visit)
        return self

    def unfreeze(self) -> Self:
        """Take the promise back: mode and gradients are what they were. Nothing happens to a model that is not frozen."""
        self._freezer.thaw(self, self._caches)
        return self

    @property
    def folded_constants(self) -> list[dict]:
        """The constants of every level that were folded when the model was frozen; none for a model that is not."""
        return [constants for cache in self._caches if (constants := cache.frozen_values) is not None]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training; FrozenError for a frozen model."""
        if mode:
            self._freezer.refuse("train()")
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether gradients of the weights are recorded; FrozenError for a frozen model."""
        if requires_grad:
            self._freezer.refuse("requires_grad_()")
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As `torch.nn.Module` has it; FrozenError for a frozen model."""
        self._freezer.refuse("load_state_dict()")
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> Self:  # what to(), cuda(), double() … do
        self._freezer.move(self, self._caches, lambda: super(Freezable, self)._apply(*arguments, **options), self._visit)
        return self
