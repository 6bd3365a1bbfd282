"""A training step and a sampling pass as CUDA graphs: thousands of kernel launches replayed as one.

Nothing in either waits for the device or looks at a value, which is what makes capture possible. The same two classes run
without capture on any device (`graph=False`), for machines without a GPU and for comparison.
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

_WARM_UP = 3  # runs before a capture: plans of cuDNN, compilation of Triton, lazy loading of modules
_WARM_UP_OF_DDP = 11  # as PyTorch's notes on CUDA graphs ask for: DistributedDataParallel rebuilds its buckets meanwhile
Loss = Callable[..., Tensor]


def mean_nll(model: nn.Module, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
    """The loss of NCSR, or of a module that wraps one: the mean of `nll` over the batch, in bits per pixel position."""
    return model(hr, lr, noise).mean()


def adam(
    parameters: nn.Module | Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> torch.optim.Adam:
    """An Adam that a graph can hold: fused, on a GPU capturable, and with the learning rate of every group in a tensor.

    A schedule writes to the tensors: `optimizer.param_groups[0]["lr"].fill_(value)`.

    Args:
        parameters: A model, for those that are trained; or what torch.optim takes: parameters, or groups with their own
            "lr".
        lr: Learning rate of the groups that have none of their own.
        betas: Of Adam.
        weight_decay: Of Adam.
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

    A call returns the result of `loss` and the gradient norm, tensors on the device that the next call overwrites. Every call
    changes the weights and the gradients too: one thread at a time.

    A step whose loss or gradient norm is not finite is skipped: weights and optimizer stay as they were. On the device,
    `counters` (int64: steps, skipped ones, skipped in a row, number of the last skipped one or -1) says so, and `rate`, a
    factor for a schedule to apply, falls by `backoff`. Reading either on a GPU waits for it.

    Args:
        model: The model that `loss` takes: an NCSR, or a module around one.
        optimizer: As `adam` makes it, or another fused one. None: gradients alone, which stay where they are from call to
            call, to be reduced over processes before a step.
        max_grad_norm: Gradients are clipped to it; None leaves them.
        loss: `(model, *inputs)` → a scalar, or a vector whose first element is minimised; it must not wait for the device.
            Inputs are tensors or None.
        graph: Capture at the first call. Weights, optimizer state and gradients are then as a step without capture leaves
            them: the runs before the capture are undone. A batch of another shape or dtype is captured anew, and so is all
            after the model was moved, frozen or thawed, after a parameter's `requires_grad`, an option, or a number of the
            optimizer changed, and after its `load_state_dict`. Of a model in DistributedDataParallel, every process must
            make the same calls.
        backoff: The factor of `rate` at a skipped step.
        reduce: Called with the detached result of `loss`, to make it the result of all processes, in place.

    Raises:
        ValueError: A model on the CPU with graph=True, or an optimizer that is not fused or cannot be captured.
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
        self._memory: _Memory | None = None  # that the captured graphs read and write

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are trained: the optimizer's, or those of the model that require a gradient."""
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
            parameter.grad = gradient  # where the graph wrote it, whatever was there since
        return results

    def _key(self, inputs: tuple[Tensor | None, ...]) -> Hashable:
        """What a graph is captured for."""
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
        """Note a step, and have the optimizer skip a `bad` one: it reads that on the device."""
        if self.optimizer is not None:
            self.optimizer.found_inf = bad.float()
        done, skipped, in_a_row, last = self.counters.unbind()
        last.copy_(torch.where(bad, done, last))
        in_a_row.add_(1).mul_(bad)
        skipped.add_(bad)
        done.add_(1)
        self.rate.mul_(torch.where(bad, self.backoff, 1.0))

    def _state(self) -> Iterator[tuple[Hashable, Tensor]]:
        """Tensors that a step changes, each with a name of its own."""
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
        """As before the capture; what the optimizer had not yet starts from zero, as Adam does."""
        for name, tensor in self._state():
            tensor.copy_(saved[name]) if name in saved else tensor.zero_()


class Sampler:
    """`NCSR.sample` of one LR shape and number of samples as a graph: `sr, first_bad = sampler(lr, temperature, generator)`.

    Captured at the first call, and anew for another LR shape or after an option of the model has changed, after the model was
    moved, frozen or thawed, or a parameter was put in another's place. The graph begins with the weights as they are when it
    is replayed. Threads may share a sampler, one of which waits for the other; all of them on one CUDA stream.

    A call returns sr (B, n, 3, sH, sW), as `NCSR.sample` does, and first_bad (B, n): the number of the decoding step after
    which a state was first beyond bounds or not finite, at least `sampler.sound` where none was; first_bad stays on the device.

    Raises:
        ValueError: A model on the CPU with graph=True.
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
        """Samples (B, n, 3, sH, sW), and (B, n) the decoding step at which each of them blew up."""
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
    """Tensors that a graph reads or writes by address: a model's, the constants of a frozen one, and others.

    The memory stays allocated while this lives, so that nothing else is found at the address.
    """

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()) -> None:
        tensors = _tensors(model, others)
        self._held = [tensor.detach() for tensor in tensors]
        self._places, self._constants = _places(tensors), _folded_constants(model)

    def is_still_that_of(self, model: nn.Module, others: Iterable[Tensor] = ()) -> bool:
        """True if a graph that was captured before is right for the model as it is."""
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
    """A function of tensors as a graph, with inputs of its own into which every call copies."""

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
    """A function as a CUDA graph of this device, after some runs of the function: the graph's replay, and its outputs.

    Other threads may allocate meanwhile, as the one of a DataLoader that pins memory does: "thread_local".
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
        raise ValueError(f"a CUDA graph needs a model on a GPU, not on {device}; graph=False runs the same without one")


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
