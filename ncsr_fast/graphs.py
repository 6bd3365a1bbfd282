"""A training step and a sampling pass as CUDA graphs: thousands of kernel launches replayed as one.

A step or a pass can be captured because nothing in it waits for the device or reads a value on the host. The same two classes
run without capture on any device (`graph=False`), for machines without a GPU and for comparison.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ncsr_fast.autocast import autocast_dtype
from ncsr_fast.flow.samples import around_prior_mean, decode_samples, draw_latents
from ncsr_fast.model import NCSR

_WARM_UP = 3  # runs before a capture: cuDNN makes plans, Triton compiles, modules are loaded
_WARM_UP_OF_DDP = 11  # as PyTorch's notes on CUDA graphs ask for: DistributedDataParallel rebuilds its buckets meanwhile
Loss = Callable[..., Tensor]


def mean_nll(model: nn.Module, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
    """The loss of NCSR, or of a module that wraps one: the mean `nll` of the batch, in bits per HR pixel position."""
    return model(hr, lr, noise).mean()


def adam(
    parameters: nn.Module | Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> torch.optim.Adam:
    """An Adam optimizer that a CUDA graph can capture.

    The optimizer is fused; on a GPU it is capturable and has the learning rate of every group in a tensor. A schedule writes to
    these tensors: `optimizer.param_groups[0]["lr"].fill_(value)`.

    Args:
        parameters: A model, of which all parameters that require gradients are trained; or what torch.optim takes: parameters,
            or groups with their own "lr".
        lr: Learning rate of the groups without an "lr".
        betas: Adam's coefficients of the running averages.
        weight_decay: Adam's weight decay.
    """
    if isinstance(parameters, nn.Module):
        parameters = [parameter for parameter in parameters.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    device = optimizer.param_groups[0]["params"][0].device
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        group["capturable"] = device.type == "cuda"
    return optimizer


class TrainingStep:
    """Forward, backward, clipping and optimizer step of one batch shape: `result, norm = step(hr, lr, noise)`.

    A call returns the result of `loss` and the gradient norm, as tensors on the device that the next call overwrites. Every
    call changes the weights and the gradients, so only one thread may call a step at a time.

    A step whose loss or gradient norm is not finite is skipped: weights and optimizer stay unchanged. Two tensors on the device
    count skipped steps. `counters` (int64) holds the number of steps, of skipped steps, of skipped steps in a row, and the
    number of the last skipped step or -1. `rate`, a factor that a schedule may apply to the learning rate, is multiplied by
    `backoff` at each skipped step. Reading either tensor waits for the GPU.

    Args:
        model: The model that `loss` takes: an NCSR, or a module that wraps one.
        optimizer: An optimizer made by `adam`, or another fused optimizer. None: gradients alone, which stay in the same memory
            from call to call, to be reduced over processes before a step.
        max_grad_norm: The norm that gradients are clipped to; None: no clipping.
        loss: `(model, *inputs)` → a scalar, or a vector whose first element is minimised; it must not wait for the device.
            Inputs are tensors or None.
        graph: Capture a CUDA graph at the first call. Weights, optimizer state and gradients are then the same as after a step
            without capture: the effect of the runs before the capture is undone. The graph is captured again for a batch of
            another shape or dtype; after the model was moved, frozen or thawed; after an option, a parameter's `requires_grad`
            or a number of the optimizer changed; and after the optimizer's `load_state_dict`. With DistributedDataParallel,
            every process must make the same calls.
        backoff: Factor of `rate` at a skipped step.
        reduce: A function that is called with the detached result of `loss`, and reduces it over all processes, in place.

    Raises:
        ValueError: graph=True with a model on the CPU, or with an optimizer that is not fused or cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        max_grad_norm: float | None = None,
        loss: Loss = mean_nll,
        graph: bool = True,
        backoff: float = 1.0,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.max_grad_norm, self.loss, self.graph = model, optimizer, max_grad_norm, loss, graph
        self.backoff, self.reduce = backoff, reduce
        if graph:
            _check_on_gpu(model)
        if optimizer is not None:
            _check_optimizer(optimizer, graph)
        self.device = next(model.parameters()).device
        self.counters = torch.tensor([0, 0, 0, -1], device=self.device)
        self.rate = torch.ones((), dtype=torch.float32, device=self.device)
        self._captured: dict[Hashable, tuple[_Captured, list[tuple[Tensor, Tensor | None]]]] = {}
        self._memory: _Memory | None = None  # read and written by the captured graphs

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters: the optimizer's, or the model's parameters that require a gradient."""
        if self.optimizer is None:
            return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result of `loss` and the gradient norm of one step on a batch."""
        if not self.graph:
            return self._run(*inputs)
        if self._memory is not None and not self._memory.is_still_that_of(self.model, self._changed()):
            self._captured.clear()
        key = self._key(inputs)
        if key not in self._captured:
            saved = {name: tensor.detach().clone() for name, tensor in self._state()}
            captured = _Captured(self._run, inputs, self.device, _warm_up(self.model))
            self._captured[key] = captured, [(parameter, parameter.grad) for parameter in self.parameters]
            self._restore(saved)
            self._memory = _Memory(self.model, self._changed())  # the optimizer's state included, which the first run makes
        captured, gradients = self._captured[key]
        results = captured(*inputs)
        for parameter, gradient in gradients:
            parameter.grad = gradient  # the tensor that the graph writes, even if it was replaced since
        return results

    def _key(self, inputs: tuple[Tensor | None, ...]) -> Hashable:
        """The properties of inputs, model and optimizer that a captured graph is valid for."""
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs)
        numbers = self.max_grad_norm, self.backoff, *self._numbers_of_optimizer()
        modes = tuple(module.training for module in self.model.modules())
        options = tuple(module.options for module in self.model.modules() if isinstance(module, NCSR))
        return shapes, numbers, modes, options, autocast_dtype(self.device.type)

    def _numbers_of_optimizer(self) -> Iterator[tuple[str, str]]:
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            yield from (
                (name, repr(value)) for name, value in group.items() if name != "params" and not isinstance(value, Tensor)
            )

    def _changed(self) -> list[Tensor]:
        return [tensor for _, tensor in self._state()]

    def _run(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = self.parameters
        for parameter in parameters:
            parameter.grad = None  # so that a replay writes the gradients instead of adding to them
        result = self.loss(self.model, *inputs)
        (result if result.dim() == 0 else result[0]).backward()
        result = result.detach()
        if self.reduce is not None:
            self.reduce(result)
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if self.max_grad_norm is None else self.max_grad_norm)
        self._count(~(result.isfinite().all() & norm.isfinite()))
        if self.optimizer is not None:
            self.optimizer.step()
        return result, norm

    def _count(self, bad: Tensor) -> None:
        """Count a step, and make the optimizer skip a `bad` step, which it reads on the device."""
        if self.optimizer is not None:
            self.optimizer.found_inf = bad.float()
        done, skipped, in_a_row, last = self.counters.unbind()
        last.copy_(torch.where(bad, done, last))
        in_a_row.add_(1).mul_(bad)
        skipped.add_(bad)
        done.add_(1)
        self.rate.mul_(torch.where(bad, self.backoff, 1.0))

    def _state(self) -> Iterator[tuple[Hashable, Tensor]]:
        """The tensors that a step changes, by name."""
        yield "counters", self.counters
        yield "rate", self.rate
        for index, parameter in enumerate(self.parameters):
            yield index, parameter
            for name, value in self.optimizer.state.get(parameter, {}).items() if self.optimizer is not None else ():
                if isinstance(value, Tensor):
                    yield (index, name), value
        for index, group in enumerate(self.optimizer.param_groups if self.optimizer is not None else ()):
            yield from ((f"{name} of group {index}", value) for name, value in group.items() if isinstance(value, Tensor))

    @torch.no_grad()
    def _restore(self, saved: dict[Hashable, Tensor]) -> None:
        """Restore the state saved before the capture; optimizer state made since is set to zero, as Adam begins."""
        for name, tensor in self._state():
            tensor.copy_(saved[name]) if name in saved else tensor.zero_()


class Sampler:
    """`NCSR.sample` of one LR shape and number of samples as a graph: `sr, first_bad = sampler(lr, temperature, generator)`.

    The graph is captured at the first call. It is captured again for another LR shape; after an option of the model has
    changed; and after the model was moved, frozen or thawed, or a parameter was replaced by another. A replay uses the weights
    as they are at that time. Threads may share a sampler, on the same CUDA stream; their calls run one after the other.

    A call returns `sr` (B, n, 3, sH, sW) as `NCSR.sample` does, and `first_bad` (B, n), on the device: the number of the first
    decoding step after which the state was beyond bounds or not finite. For a sound sample `first_bad` is `sampler.sound` or
    more.

    Raises:
        ValueError: graph=True with a model on the CPU.
    """

    def __init__(self, model: NCSR, n: int, *, graph: bool = True) -> None:
        self.model, self.n, self.graph = model, n, graph
        if graph:
            _check_on_gpu(model)
        self.sound = sum(level.steps for level in model.levels) + 1
        self._captured: tuple[Hashable, _Memory, _Captured] | None = None
        self._one_at_a_time = threading.Lock()  # replays share their inputs and outputs

    @torch.no_grad()
    def __call__(self, lr: Tensor, temperature: float = 0.9, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Samples (B, n, 3, sH, sW), and for each the decoding step at which it blew up, (B, n)."""
        padded = self.model.padded(lr)
        shapes = self.model.latent_shapes(*lr.shape[2:])
        latents = draw_latents(shapes, lr.shape[0], self.n, temperature, lr, generator)
        if not self.graph:
            images, first_bad = self._run(padded, *latents)
            return self.model.inputs.shown(images, lr), first_bad
        with self._one_at_a_time:
            images, first_bad = self._graph(padded, *latents)(padded, *latents)
            return self.model.inputs.shown(images, lr), first_bad.clone()

    def _graph(self, lr: Tensor, *latents: Tensor) -> _Captured:
        key = lr.shape, lr.dtype, self.model.served
        if self._captured is None or self._captured[0] != key or not self._captured[1].is_still_that_of(self.model):
            self._captured = None  # its memory is free for the next one
            captured = _Captured(self._run, (lr, *latents), lr.device, _WARM_UP)
            self._captured = key, _Memory(self.model), captured
        return self._captured[2]

    def _run(self, lr: Tensor, *latents: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.model.conditioned_levels(lr)
        return decode_samples(levels, around_prior_mean(list(latents), levels.condition.prior_mean), watch=True)


class _Memory:
    """Tensors that a graph reads or writes by address: those of a model, of its frozen constants, and others.

    Their memory stays allocated as long as this object exists, so that no other tensor gets the same address.
    """

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()) -> None:
        tensors = _tensors(model, others)
        self._held = [tensor.detach() for tensor in tensors]
        self._places, self._constants = _places(tensors), _folded_constants(model)

    def is_still_that_of(self, model: nn.Module, others: Iterable[Tensor] = ()) -> bool:
        """True if a graph captured with this memory is valid for the model as it is now."""
        constants = _folded_constants(model)
        same = len(constants) == len(self._constants) and all(a is b for a, b in zip(constants, self._constants))
        return same and _places(_tensors(model, others)) == self._places


def _tensors(model: nn.Module, others: Iterable[Tensor]) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *others]


def _places(tensors: list[Tensor]) -> list[tuple]:
    return [(tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.requires_grad) for tensor in tensors]


def _folded_constants(model: nn.Module) -> list[dict]:
    flows = [module for module in model.modules() if isinstance(module, NCSR)]
    return [constants for flow in flows for constants in flow.folded_constants]


class _Captured:
    """A function of tensors as a graph; every call copies its arguments into the graph's own inputs."""

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor | None, ...],
        device: torch.device,
        warm_up: int,
    ) -> None:
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self.replay, self.outputs = capture(lambda: function(*self.inputs), device, warm_up)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        for static, tensor in zip(self.inputs, inputs):
            if static is not None:
                static.copy_(tensor)
        self.replay()
        return self.outputs


def capture(
    function: Callable[[], tuple[Tensor, ...]], device: str | torch.device, warm_up: int
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """The replay of a function captured as a CUDA graph on this device, and its outputs; the function runs a few times first.

    Other threads, such as the pinning thread of a DataLoader, may allocate during the capture ("thread_local").
    """
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, outputs


def _warm_up(model: nn.Module) -> int:
    """The number of runs before a capture."""
    distributed = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    return _WARM_UP_OF_DDP if distributed else _WARM_UP


def _check_on_gpu(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a model on a GPU, not on {device}; graph=False runs without one")


def _check_optimizer(optimizer: torch.optim.Optimizer, graph: bool) -> None:
    for group in optimizer.param_groups:
        if not group.get("fused"):
            raise ValueError(
                "the optimizer must be fused, so that it can skip a step on the device: use ncsr_fast.graphs.adam(model, lr)"
            )
        if graph and not (group.get("capturable") and isinstance(group["lr"], Tensor)):
            raise ValueError(
                "the optimizer must be capturable, with its learning rate in a tensor, so that a graph can hold it: "
                "use ncsr_fast.graphs.adam(model, lr)"
            )
