"""Tensors that say they are on a GPU and have no memory, so that what the package does on one can be seen without one.

    with fake_cuda():
        model = NCSR(NCSRConfig()).to("cuda")
        sampler = graphs.Sampler(model, 10, graph=False)
        sampler(torch.rand(1, 3, 40, 40, device="cuda"))

They are tensors of the "meta" device: PyTorch knows their shapes, dtypes and strides, and computes nothing. Inside the context
that device is called a GPU wherever Python asks for it, so that the package takes the paths it takes on one: the Triton
kernels' host code, which starts `torch.ops.ncsr_fast_trace.launch` in place of a kernel, and cuDNN's convolutions, in the
layout cuDNN would give them. As on a GPU, operators refuse to mix devices; unlike there, a value cannot be read at all.
It works in builds of PyTorch with CUDA and without, and leaves a GPU alone where there is one.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ncsr_fast import tuning
from ncsr_fast.ops import backends
from ncsr_fast.ops.backend import forget

from .waiting import HostWaits, on_gpu, tensors_in

DEVICE = torch.device("cuda", 99)  # a number that no GPU has, so that nothing cached for it is taken for a real one's
MEMORY = 150_754_820_096  # bytes, an H200's: by how much there is, the engine decides what it computes together

_META = torch.device("meta")
_LIBRARY = torch.library.Library("ncsr_fast_trace", "DEF")  # the operator lives as long as it does
_LIBRARY.define("launch(str kernel, Tensor[] tensors) -> ()")
_LIBRARY.impl("launch", lambda kernel, tensors: None, "CompositeExplicitAutograd")


class MixedDevices(RuntimeError):
    """An operator was given tensors of the CPU and of the fake GPU."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, "cuda" is the fake GPU. Modes entered later see every operator, and launches of kernels as one.

    Raises:
        ImportError: Without Triton, whose kernels' host code is what runs on a GPU.
    """
    importlib.import_module("torch._dynamo")  # by meta kernels, otherwise: older ones cannot be imported in a mode
    with contextlib.ExitStack() as stack:
        for module in _kernel_modules():
            stack.enter_context(mock.patch.object(module, "launch", _launch))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "is_available", lambda: True))
        memory = SimpleNamespace(total_memory=MEMORY)
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: memory))
        stack.enter_context(mock.patch.object(tuning, "gpu", lambda: None))  # backends are chosen by the table for any GPU
        forget()
        stack.callback(forget)
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        stack.enter_context(_Operators())
        stack.enter_context(_Names())
        yield


def cudnn_layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout in which cuDNN convolves two tensors: channels-last where either lies so, but for float64."""
    tensors = [tensor for tensor in (x, weight) if tensor.dim() == 4 and tensor.dtype != torch.float64]
    last = any(suggest_memory_format(tensor) == torch.channels_last for tensor in tensors)
    return torch.channels_last if last else torch.contiguous_format


# -- what Python is told ---------------------------------------------------------------------------------------------


class _Names(TorchFunctionMode):
    """Calls the meta device "cuda" in what functions are given and attributes of tensors say.

    PyTorch leaves the mode while a function runs. The backward pass, in which code of the package runs, enters it again.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _ATTRIBUTES and args[0].is_meta:
            return _ATTRIBUTES[function]
        if function in _READERS and args[0].is_meta:
            raise HostWaits(f"Tensor.{_READERS[function]} makes the host wait for the device: it reads values")
        if function is Tensor.backward:
            with self:
                return _backward(*args, **kwargs)
        if function in _REFUSED:
            raise NotImplementedError(f"{_REFUSED[function]} is not traced: call Tensor.backward")
        arguments = {key: _real(value) for key, value in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor) and arguments.get("device") == _META:
            del arguments["device"]
            return function(*args, **arguments).to(_META)  # copied from the CPU, of which PyTorch tells modes on a GPU alone
        return function(*map(_real, args), **arguments)


_ATTRIBUTES = {
    Tensor.device.__get__: DEVICE,
    Tensor.get_device: DEVICE.index,
    Tensor.is_cuda.__get__: True,
    Tensor.is_meta.__get__: False,
}
_READERS = {
    getattr(Tensor, name): name
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "is_nonzero")
    if hasattr(Tensor, name)
}
_REFUSED = {torch.autograd.backward: "torch.autograd.backward", torch.autograd.grad: "torch.autograd.grad"}


def _real(value: Any) -> Any:
    """The meta device where "cuda" is meant, any other value as it is."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return _META
    return _META if isinstance(value, torch.device) and value.type == "cuda" else value


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Tensor.backward, whose own code would leave the mode."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    run, retained = torch.autograd.Variable._execution_engine.run_backward, bool(retain_graph or create_graph)
    run((tensor,), (gradient,), retained, create_graph, tuple(inputs or ()), allow_unreachable=True, accumulate_grad=True)


_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: list[list[Tensor | None]], with_indices: bool = False) -> dict:
    """The grouping of optimizers and of clipping, which decide by its devices whether there are kernels for many tensors."""
    groups = _group(lists, with_indices)
    return {(DEVICE if device == _META else device, dtype): group for (device, dtype), group in groups.items()}


# -- what operators do -----------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Runs operators on meta tensors where CUDA's differ from the meta device's own."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet = operator.overloadpacket
        with torch._C.DisableTorchFunction():
            _check_devices(operator, args, kwargs)
            if packet is torch.ops.aten._convolution:
                return _convolution(torch.ops.aten.convolution.default, args[:9], {})
            if packet in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
                return _convolution(operator, args, kwargs)
            if operator.name().startswith("aten::_fused_"):  # of an optimizer: changes its arguments, and has no meta kernel
                return None
            return operator(*args, **kwargs)


def _check_devices(operator: Any, args: tuple, kwargs: dict) -> None:
    """Raise MixedDevices for what a GPU refuses, and HostWaits where values are brought from it."""
    tensors = tensors_in(args, kwargs)
    there = [tensor for tensor in tensors if on_gpu(tensor)]
    if not there:
        return
    packet = operator.overloadpacket
    if packet is torch.ops.aten._to_copy and kwargs.get("device", _META) != _META:
        raise HostWaits(f"{operator} brings a tensor from the GPU to the {kwargs['device']}")
    if packet is torch.ops.aten.copy_:
        if not on_gpu(args[0]):
            raise HostWaits(f"{operator} brings a tensor from the GPU to the {args[0].device}")
    elif any(not on_gpu(tensor) and tensor.dim() for tensor in tensors):
        shapes = ", ".join(f"{'cuda' if on_gpu(tensor) else tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
        raise MixedDevices(f"{operator} mixes devices: {shapes}")


def _convolution(operator: Any, args: tuple, kwargs: dict) -> Any:
    """A convolution or its gradients, in cuDNN's layout."""
    x, weight = args[:2] if operator.overloadpacket is torch.ops.aten.convolution else args[1:3]
    layout = cudnn_layout(x, weight)

    def laid_out(result: Tensor) -> Tensor:
        return result.contiguous(memory_format=layout) if result.dim() == 4 else result

    return tree_map_only(Tensor, laid_out, operator(*args, **kwargs))


# -- kernels ---------------------------------------------------------------------------------------------------------


def _kernel_modules() -> list[Any]:
    """The modules of kernels that start some."""
    found = backends("cuda")["triton"]
    if not found.available:
        raise ImportError(f"what runs on a GPU is traced with the host code of the Triton kernels: {found.reason}")
    from ncsr_fast import kernels

    names = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(name) for name in names if not name.endswith(".ahead_of_time")]
    return [module for module in modules if hasattr(module, "launch")]


def _launch(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    """In place of `ncsr_fast.kernels._common.launch`: an operator, which modes see."""
    torch.ops.ncsr_fast_trace.launch(kernel.fn.__name__, tensors_in(arguments))
