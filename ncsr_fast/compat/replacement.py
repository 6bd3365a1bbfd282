"""Replacements of a module's `forward`, and the conditions under which the module's own code runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.layout import traced
from ncsr_fast.warn import warn_caller

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in _HOOKS)
_COUNTING = threading.Lock()  # replicas in several threads share a count
_REPLICATE = "_replicate_for_data_parallel"  # what DataParallel calls to copy a module to another device


class Unsupported(ValueError):
    """The reason why a module or a call is left to the module's own code."""


class Passing(Unsupported):
    """A reason that is part of a module's use, of which no warning tells: its first call, or a context that traces it."""


class Replacement:
    """A substitute for the `methods` of one module.

    The methods are attributes of the instance, so that the module's hooks, its class and wrappers around it stay as they are.
    Parameters stay in the module, and every call reads them there. A call that cannot be served is handed over to the
    module's own method; the reason is counted in `handed_over`, and the first call for a reason warns. A copy or a pickle of
    the module, and the replicas that DataParallel makes of it, have their own replacement.
    """

    methods: tuple[str, ...] = ("forward",)
    passed_over: tuple[str, ...] | None = None  # children whose forward is not called; None: no submodule's is

    def __init__(self, module: nn.Module, handed_over: Counter[str] | None = None) -> None:
        self.module, self.handed_over = module, Counter() if handed_over is None else handed_over
        self._tree: Tree | None = None

    def install(self) -> None:
        for method in self.methods:
            self.module.__dict__[method] = getattr(self, method)
        self.module.__dict__[_REPLICATE] = self._replicate
        self._tree = Tree(self.module, self.passed_over)

    def remove(self) -> None:
        for method in (*self.methods, _REPLICATE):
            self.module.__dict__.pop(method, None)

    @staticmethod
    def of(module: nn.Module) -> Replacement | None:
        """The replacement that is installed in a module."""
        owner = getattr(module.__dict__.get(_REPLICATE), "__self__", None)
        return owner if isinstance(owner, Replacement) else None

    def own(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the module's own method."""
        return getattr(type(self.module), method)(self.module, *arguments, **options)

    def hand_over(self, reason: Unsupported, method: str, *arguments: Any, **options: Any) -> Any:
        with _COUNTING:
            self.handed_over[str(reason)] += 1
            is_first = self.handed_over[str(reason)] == 1
        if is_first and not isinstance(reason, Passing) and Replacement.of(self.module) is self:  # no trial
            warn_caller(f"the accelerated {type(self.module).__name__} runs its own code: {reason}")
        return self.own(method, *arguments, **options)

    def for_replica(self, replica: nn.Module) -> Replacement:
        """A replacement that reads the parameters of `replica`."""
        return type(self)(replica, self.handed_over)

    def check(self) -> None:
        """Raise Unsupported if no call can be served in this context, or because the module was changed."""
        check_context()
        if self._tree is None:
            self._tree = Tree(self.module, self.passed_over)
        self._tree.check()

    def _replicate(self) -> nn.Module:
        replica = self.own(_REPLICATE)
        replacement = self.for_replica(replica)
        replacement.install()
        replacement._tree = None  # made in its first call, because it has no children yet
        return replica


class _Edge(NamedTuple):
    name: str
    parent: nn.Module
    key: str
    child: nn.Module


class Tree:
    """The submodules of a module, or of some of its children, at the time of recognition."""

    def __init__(self, module: nn.Module, children: tuple[str, ...] | None) -> None:
        self._edges = [edge for edge in _edges(module) if children is None or edge.name.split(".")[0] in children]
        self._parents = [(parent, len(parent._modules)) for parent in [module, *(edge.child for edge in self._edges)]]

    def check(self) -> None:
        """Raise Unsupported if submodules were exchanged, added or removed, or have hooks or another forward."""
        if any(len(parent._modules) != count for parent, count in self._parents):
            raise Unsupported("submodules were added or removed")
        for name, parent, key, child in self._edges:
            if parent._modules.get(key) is not child:
                raise Unsupported(f"{name} was exchanged for another module")
            attributes = child.__dict__
            if any(attributes.get(hooks) for hooks in _HOOKS):
                raise Unsupported(f"{name} has hooks, which would not run")
            if "forward" in attributes and Replacement.of(child) is None:
                raise Unsupported(f"the forward of {name} was replaced")


def _edges(module: nn.Module, prefix: str = "") -> Iterator[_Edge]:
    for key, child in module._modules.items():
        if child is not None:
            yield _Edge(prefix + key, module, key, child)
            yield from _edges(child, f"{prefix}{key}.")


def check_context() -> None:
    """Raise Passing in contexts that trace the module's own code, or change what it computes."""
    if traced():
        raise Passing("torch.compile or torch.func traces it")
    if torch.jit.is_tracing():
        raise Passing("torch.jit traces it")
    if any(getattr(torch.nn.modules.module, hooks) for hooks in _GLOBAL_HOOKS):
        raise Passing("there are global module hooks, which would not run")


def check_tensor(name: str, tensor: Any, shape: tuple[int | None, ...], like: Tensor, anywhere: bool = False) -> None:
    """Raise Unsupported unless `tensor` is an ordinary tensor with this shape and with the dtype and device of `like`.

    Sizes that are None may be any; with `anywhere` the device may be any.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise Unsupported(f"{name} is not an ordinary tensor")
    if tensor.dim() != len(shape) or any(size not in (None, there) for size, there in zip(shape, tensor.shape)):
        raise Unsupported(f"{name} has another shape than the network's")
    if tensor.dtype != like.dtype or not (anywhere or tensor.device == like.device):
        raise Unsupported(f"{name} has another dtype or device than the parameters")


def expect(module: nn.Module, name: str, **attributes: Any) -> None:
    """Raise Unsupported if an attribute of the module has a value that is not served."""
    for attribute, expected in attributes.items():
        value = getattr(module, attribute, expected)
        if value != expected:
            raise Unsupported(f"{name}.{attribute} is {value!r}, and only {expected!r} is served")
