"""A training step and a sampling pass as CUDA graphs: thousands of kernel launches replayed as one.

Nothing in either waits for the device or looks at a value, which is what makes capture possible. The same two classes run
without capture on any device (`graph=False`), for machines without a GPU and for comparison.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast.autocast import autocast_dtype
from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.nn.sampling import decode_samples, draw_latents

_WARM_UP = 3  # runs before a capture: plans of cuDNN, compilation of Triton, lazy loading of modules
Loss = Callable[..., Tensor]


def mean_nll(model: nn.Module, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> Tensor:
    """The loss of NCSR, or of a module that wraps one: the mean of `nll` over the batch, in bits per pixel position."""
    return model(hr, lr, noise).mean()


def adam(
    parameters: nn.Module | Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> torch.optim.Adam:
    """An Adam that a graph can hold: fused, on a GPU capturable, and with the learning rate of every group in a tensor.

    parameters  a model, for those that are trained; or what torch.optim takes: parameters, or groups with their own "lr"

    A schedule writes to the tensors: `optimizer.param_groups[0]["lr"].fill_(value)`.
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

    model             whatever `loss` takes: an NCSR, or a module around one
    optimizer         as `adam` makes it, or another fused one. None: gradients alone, which stay where they are from call to
                      call, to be reduced over processes before a step
    max_grad_norm     gradients are clipped to it; None leaves them
    loss              (model, *inputs) → a scalar, or a vector whose first element is minimised; it must not wait for the
                      device. Inputs are tensors or None.
    graph             capture at the first call. Weights, optimizer state and gradients are then as a step without capture
                      leaves them: the runs before the capture are undone. A batch of another shape is captured anew.
    backoff           what `rate` is multiplied by at a skipped step
    reduce            called with what `loss` returned, detached, to make it that of all processes, in place
    returns           what `loss` returned and the gradient norm, tensors on the device that the next call overwrites

    Every call changes the weights, the gradients and what it returned before: one thread at a time.

    A step whose loss or gradient norm is not finite is skipped: weights and optimizer stay as they were. On the device,
    `counters` (int64: steps, skipped ones, skipped in a row, number of the last skipped one or -1) says so, and `rate`, a
    factor for a schedule to apply, falls by `backoff`. Reading either on a GPU waits for it.

    raises  ValueError for a model on the CPU with graph=True, or for an optimizer that is not fused or cannot be captured
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
        if optimizer is None:
            self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        else:
            self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if graph:
            _check_on_gpu(model)
        if optimizer is not None:
            _check_optimizer(optimizer, graph)
        device = self.parameters[0].device
        self.counters = torch.tensor([0, 0, 0, -1], device=device)
        self.rate = torch.ones((), dtype=torch.float32, device=device)
        self._captured: dict[object, tuple[_Captured, list[Tensor | None]]] = {}

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.graph:
            return self._run(*inputs)
        shapes = [None if tensor is None else tensor.shape for tensor in inputs]
        key = *shapes, getattr(self.model, "options", None), autocast_dtype(self.parameters[0].device.type)
        if key not in self._captured:
            saved = list(_copies(self._state()))
            captured = _Captured(self._run, inputs)
            self._captured[key] = captured, [parameter.grad for parameter in self.parameters]
            self._restore(saved)
        captured, gradients = self._captured[key]
        results = captured(*inputs)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient  # where the graph wrote it, whatever was there since
        return results

    def _run(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None  # so that a replay writes the gradients instead of adding to them
        result = self.loss(self.model, *inputs)
        (result if result.dim() == 0 else result[0]).backward()
        result = result.detach()
        if self.reduce is not None:
            self.reduce(result)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if self.max_grad_norm is None else self.max_grad_norm)
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

    def _state(self) -> Iterator[Tensor]:
        yield from (self.counters, self.rate)
        yield from self.parameters
        for parameter in self.parameters if self.optimizer is not None else ():
            yield from (value for value in self.optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))

    @torch.no_grad()
    def _restore(self, saved: list[Tensor]) -> None:
        """As before the capture; what the optimizer had not yet starts from zero, as Adam does."""
        for index, tensor in enumerate(self._state()):
            tensor.copy_(saved[index]) if index < len(saved) else tensor.zero_()


class Sampler:
    """`NCSR.sample` of one LR shape and number of samples as a graph: `sr, first_bad = sampler(lr, temperature, generator)`.

    sr         (B, n, 3, sH, sW) as `NCSR.sample` returns it
    first_bad  (B, n): the number of the decoding step after which a state was first beyond bounds or not finite, at least
               `sampler.sound` where none was; it stays on the device

    Captured at the first call, and anew when an option of the model has changed. The graph begins with the weights as they
    are when it is replayed. Threads may share a sampler, one of which waits for the other; all of them on one CUDA stream.

    raises  ValueError for a model on the CPU with graph=True
    """

    def __init__(self, model: NCSR, n: int, *, graph: bool = True) -> None:
        self.model, self.n, self.graph = model, n, graph
        if graph:
            _check_on_gpu(model)
        self.sound = sum(level.steps for level in model.levels) + 1
        self._captured: tuple[object, _Captured] | None = None
        self._one_at_a_time = threading.Lock()  # replays share their inputs and outputs

    @torch.no_grad()
    def __call__(self, lr: Tensor, temperature: float = 0.9, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        padded = self.model.padded(lr)
        shapes = self.model.latent_shapes(*lr.shape[2:])
        latents = draw_latents(shapes, lr.shape[0], self.n, temperature, lr, generator)
        key = lr.shape, self.model.served
        if not self.graph:
            images, first_bad = self._run(padded, *latents)
            return self.model.shown(images, lr), first_bad
        with self._one_at_a_time:
            if self._captured is None or self._captured[0] != key:
                self._captured = key, _Captured(self._run, (padded, *latents))
            images, first_bad = self._captured[1](padded, *latents)
            return self.model.shown(images, lr), first_bad.clone()

    def _run(self, lr: Tensor, *latents: Tensor) -> tuple[Tensor, Tensor]:
        return decode_samples(self.model, self.model.features(lr), list(latents), watch=True)


class _Captured:
    """A function of tensors as a graph, with inputs of its own into which every call copies."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        for static, tensor in zip(self.inputs, inputs):
            if static is not None:
                static.copy_(tensor)
        self.graph.replay()
        return self.outputs


def _copies(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    return (tensor.detach().clone() for tensor in tensors)


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
