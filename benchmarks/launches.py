"""How many kernels a GPU would be asked for, and how many bytes they would touch: counted operator by operator.

The numbers are estimates from PyTorch's source, meant to be compared with each other: cuDNN and cuBLAS are one kernel a call,
caches hold nothing, and what is read twice by one kernel counts once. A kernel launch takes a GPU at least about 2 µs.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .fake_cuda import cudnn_layout
from .waiting import on_gpu, tensors_in

_PACKAGE = "ncsr_fast."
REST = "rest"
# The part of a pass that an operator belongs to, by the innermost function on the stack that is here; "*" is any other of
# its module.
PARTS: dict[str, dict[str, str]] = {
    "ncsr_fast.encoder.rrdb": {"*": "encoder"},
    "ncsr_fast.encoder.blocks": {"*": "encoder"},
    "ncsr_fast.engine.dense_block": {"*": "encoder"},
    "ncsr_fast.engine.residual_blocks": {"*": "encoder"},
    "ncsr_fast.engine.folding": {"fold_zeros_convolution": "split", "*": "fold"},
    "ncsr_fast.engine.hoisting": {"prepared": "fold", "*": "hoist"},
    "ncsr_fast.engine.plan": {
        "_folded_mixing": "fold", "_fold": "fold", "_stacked": "fold", "_add_known": "hoist", "_add_features": "hoist",
        "_add_branch": "hoist", "_noise_source": "hoist", "_tails": "injectors", "folded_split": "split",
        "split_prior": "split",
    },
    "ncsr_fast.engine.walk": {"run": "steps", "output": "steps", "evaluate_free": "injectors"},
    "ncsr_fast.engine.gradient": {"_forward": "steps", "_backward": "steps"},
    "ncsr_fast.engine.network_backward": {"_run_waiting": "injectors"},
    "ncsr_fast.ops.coupled_step": {"largest": "watch", "peaks": "watch"},
    "ncsr_fast.ops.fold_filters": {"*": "fold"},
    "ncsr_fast.ops.gaussian_split": {"*": "split"},
    "ncsr_fast.flow.samples": {"draw": "draws", "draw_latents": "draws", "_first_bad": "watch"},
    "ncsr_fast.training.batch": {"*": "data"},
    "ncsr_fast.graphs": {"_count": "clipping"},
    "torch.nn.utils.clip_grad": {"*": "clipping"},
    "torch.optim.adam": {"*": "optimizer"},
    "torch.optim.optimizer": {"*": "optimizer"},
    # the backward passes of single convolutions, and of what is plain PyTorch, the fold foremost
    "ncsr_fast.benchmarks.fake_cuda": {"_backward": "autograd"},
}  # fmt: skip
# What a part is called where an operator's own module is further in.
INSIDE = {
    (REST, "ncsr_fast.ops.conv3x3"): "other convolutions",
    ("autograd", "ncsr_fast.ops.conv3x3"): "other convolutions",
}

# Launches of operators that are more than one: those with a filled result, and estimates for batched linear algebra.
_SEVERAL = {
    "select_backward": 2, "slice_backward": 2, "diag_embed": 2, "_linalg_slogdet": 15, "linalg_inv_ex": 15,
    "linalg_lu_solve": 8,
}  # fmt: skip
_ALLOCATIONS = ("empty", "new_empty", "_unsafe_view")  # beginnings of the names of operators that launch nothing
_CONCATENATED = 128  # tensors that a kernel of `cat` takes
# Tensors that a kernel of a `_foreach` or fused operator takes, by how many lists there are, and chunks of so many elements
_LISTED, _CHUNKS, _CHUNK = (110, 64, 48, 36, 30), 320, 65536


@dataclass
class Count:
    """Counts of what a pass or a part of it consists of.

    Attributes:
        operations: ATen operators that compute.
        kernels: Launches of the package's own kernels.
        launches: Of all kernels, those inside ATen operators included.
        bytes: That kernels read and write.
        flops: Of convolutions and matrix products of ATen, a multiplication and an addition being two.
    """

    operations: int = 0
    kernels: int = 0
    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def add(self, other: Count) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class LaunchCounter(TorchDispatchMode):
    """Counts what runs on a GPU, real or fake, while it is entered.

    Attributes:
        parts: A count for each part of `PARTS` that there was anything of, and for the rest.
        launches: The same launches by operator or kernel.
        on_cpu: How often each operator was given and returned tensors of the CPU alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Count] = defaultdict(Count)
        self.launches: Counter[str] = Counter()
        self.on_cpu: Counter[str] = Counter()

    @property
    def total(self) -> Count:
        """Sum of the counts of all parts."""
        total = Count()
        for count in self.parts.values():
            total.add(count)
        return total

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self._note(operator, args, kwargs, result)
        return result

    def _note(self, operator: Any, args: tuple, kwargs: dict, result: Any) -> None:
        tensors = tensors_in(args, kwargs, result)
        if not any(map(on_gpu, tensors)):
            if tensors:  # and not a mark for the profiler
                self.on_cpu[_name(operator)] += 1
            return
        if _launches_nothing(operator, args, kwargs, result):
            return
        if operator.name().startswith("ncsr_fast_trace::launch"):
            count, name = Count(kernels=1, launches=1, bytes=_bytes(*args[1])), args[0]
        else:
            count, name = _count(operator, args, kwargs, result), _name(operator)
        self.parts[_part(sys._getframe(2))].add(count)
        self.launches[name] += count.launches


def _part(frame: FrameType | None) -> str:
    """The part of a pass in which a frame of the stack is."""
    part, inside = None, set()
    while frame is not None and part is None:
        module = frame.f_globals.get("__name__", "")
        functions = PARTS.get(module, {})
        part = functions.get(frame.f_code.co_name) or functions.get("*")
        inside.add(module)
        frame = frame.f_back
    part = part or REST
    return next((INSIDE[part, module] for module in inside if (part, module) in INSIDE), part)


def _launches_nothing(operator: Any, args: tuple, kwargs: dict, result: Any) -> bool:
    """True for views, for memory that is not filled, for conversions of what is there already, and for empty tensors."""
    name = _name(operator)
    if name == "_to_copy" and on_gpu(args[0]) and kwargs.get("memory_format") is None:
        return args[0].dtype == result.dtype and args[0].stride() == result.stride()
    aliases = [value.alias_info for value in operator._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or name.startswith(_ALLOCATIONS) or not any(map(_elements, tensors_in(result) or tensors_in(args, kwargs)))


def _count(operator: Any, args: tuple, kwargs: dict, result: Any) -> Count:
    """The counts of a call of an ATen operator."""
    name = _name(operator)
    flops = flop_registry.get(operator.overloadpacket)
    count = Count(
        operations=1,
        launches=_launches(name, args),
        bytes=_bytes(*_read(operator, args, kwargs), *_written(operator, args, result)),
        flops=0 if flops is None else flops(*args, **kwargs, out_val=result),
    )
    if name in ("convolution", "_convolution"):
        count.add(_inside_convolution(*args[:3], result))
    elif name == "convolution_backward":
        count.add(_inside_convolution_backward(*args[:3], args[-1]))
    return count


def _launches(name: str, args: tuple) -> int:
    """The launches of an operator other than a convolution."""
    if name.startswith("_foreach") or name.startswith("_fused"):
        return _list_launches(args) * (2 if "norm" in name else 1)  # norms are of chunks, then of tensors
    return math.ceil(len(args[0]) / _CONCATENATED) if name in ("cat", "stack") else _SEVERAL.get(name, 1)


def _list_launches(args: tuple) -> int:
    """Launches of a kernel that takes lists of tensors; an optimizer's list of step numbers goes with them."""
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    count = max(1, sum(value[0].dim() > 0 for value in lists))
    most = _LISTED[min(count, len(_LISTED)) - 1]
    chunks = sum(math.ceil(tensor.numel() / _CHUNK) for tensor in lists[0])
    return max(math.ceil(len(lists[0]) / most), math.ceil(chunks / _CHUNKS))


def _inside_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> Count:
    """The launches around cuDNN's kernel: copies of operands that lie in another layout, and the addition of the bias."""
    extra = _copies(cudnn_layout(x, weight), x, weight)
    if bias is not None:
        extra.add(Count(launches=1, bytes=2 * _bytes(result)))
    return extra


def _inside_convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> Count:
    """The launches around cuDNN's kernels for the gradients of x, weight and bias."""
    read = [dy] + [x] * needed[1] + [weight] * needed[0]
    extra = _copies(cudnn_layout(x, weight), *read)
    extra.add(Count(launches=sum(needed) - 1))
    return extra


def _copies(layout: torch.memory_format, *tensors: Tensor) -> Count:
    """The copies of those tensors that lie in another layout, or are not dense."""
    copied = [tensor for tensor in tensors if not tensor.is_contiguous(memory_format=layout)]
    return Count(launches=len(copied), bytes=2 * _bytes(*copied))


def _read(operator: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operator reads: not those that it overwrites, which are among its results."""
    if _name(operator) in ("copy_", "fill_", "zero_"):
        return tensors_in(args[1:], kwargs)
    written = {argument.name for argument in operator._schema.arguments if argument.is_out}
    return tensors_in(args, {key: value for key, value in kwargs.items() if key not in written})


def _written(operator: Any, args: tuple, result: Any) -> list[Tensor]:
    """The tensors that an operator writes: its results, or those in its lists that it changes. An optimizer changes gradients
    only where it scales them, which ours does not."""
    if operator._schema.returns:
        return tensors_in(result)
    pairs = zip(operator._schema.arguments, args)
    return tensors_in(
        [value for each, value in pairs if each.alias_info is not None and each.alias_info.is_write and each.name != "grads"]
    )


def _bytes(*tensors: Tensor) -> int:
    """The bytes of the different elements of GPU tensors."""
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors if on_gpu(tensor))


def _elements(tensor: Tensor) -> int:
    """Number of elements in memory: those of an expanded tensor once."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride) if tensor.numel() else 0


def _name(operator: Any) -> str:
    return operator.name().split("::")[1].split(".")[0]
