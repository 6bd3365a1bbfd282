"""A training step and a sampling pass as CUDA graphs: thousands of kernel launches replayed as one.

Nothing in either waits for the device or looks at a value, which is what makes capture possible. The same two classes run
without capture on any device (`graph=False`), for machines without a GPU and for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ncsr_fast.nn.ncsr import NCSR
from ncsr_fast.nn.sampling import decode_samples, draw_latents

_WARM_UP = 3  # runs before a capture: plans of cuDNN, compilation of Triton, lazy loading of modules
NllLoss = Callable[[NCSR, Tensor, Tensor, Tensor | None], Tensor]


def mean_nll(model: NCSR, hr: Tensor, lr: Tensor, noise: Tensor | None) -> Tensor:
    """The loss of NCSR: the mean of `nll` over the batch, in bits per pixel position."""
    return model.nll(hr, lr, noise).mean()


def adam(model: NCSR, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.Adam:
    """An Adam that a graph can hold: fused, and on a GPU capturable with its learning rate in a tensor.

    A schedule writes to that tensor: `optimizer.param_groups[0]["lr"].fill_(value)`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters[0].is_cuda:
        return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
    rate = torch.tensor(lr, device=parameters[0].device)
    return torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True, capturable=True)


class TrainingStep:
    """Forward, backward, clipping and optimizer step of one batch shape: `loss, norm = step(hr, lr, noise)`.

    optimizer         as `adam` makes it; one that a graph cannot hold is refused. None: gradients alone, which stay where
                      they are from call to call, to be reduced over processes before a step
    max_grad_norm     gradients are clipped to it; None leaves them
    loss              (model, hr, lr, noise) → scalar; it must not wait for the device
    graph             capture at the first call. Weights, optimizer state and gradients are then as a step without capture
                      leaves them: the runs before the capture are undone. A batch of another shape is captured anew.
    returns           loss and gradient norm, tensors on the device that the next call overwrites

    raises  ValueError for a model on the CPU with graph=True, or for an optimizer that is not capturable
    """

    def __init__(
        self,
        model: NCSR,
        optimizer: torch.optim.Optimizer | None,
        *,
        max_grad_norm: float | None = None,
        loss: NllLoss = mean_nll,
        graph: bool = True,
    ) -> None:
        self.model, self.optimizer, self.max_grad_norm, self.loss, self.graph = model, optimizer, max_grad_norm, loss, graph
        if optimizer is None:
            self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        else:
            self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if graph:
            _check_on_gpu(model)
            _check_capturable(optimizer)
        self._captured: dict[object, tuple[_Captured, list[Tensor | None]]] = {}

    def __call__(self, hr: Tensor, lr: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.graph:
            return self._run(hr, lr, noise)
        key = (hr.shape, lr.shape, None if noise is None else noise.shape, self.model.options)
        if key not in self._captured:
            saved = list(_copies(self._state()))
            captured = _Captured(self._run, (hr, lr, noise))
            self._captured[key] = captured, [parameter.grad for parameter in self.parameters]
            self._restore(saved)
        captured, gradients = self._captured[key]
        results = captured(hr, lr, noise)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient  # where the graph wrote it, whatever was there since
        return results

    def _run(self, hr: Tensor, lr: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None  # so that a replay writes the gradients instead of adding to them
        loss = self.loss(self.model, hr, lr, noise)
        loss.backward()
        if self.max_grad_norm is None:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach(), norm

    def _state(self) -> Iterator[Tensor]:
        yield from self.parameters
        for parameter in self.parameters if self.optimizer is not None else ():
            yield from (value for value in self.optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))

    @torch.no_grad()
    def _restore(self, saved: list[Tensor]) -> None:
        """Weights and optimizer state as before; what the optimizer had not yet starts from zero, as Adam does."""
        state = list(self._state())
        fresh = len(saved) == len(self.parameters)
        for index, tensor in enumerate(state):
            tensor.zero_() if fresh and index >= len(saved) else tensor.copy_(saved[index])


class Sampler:
    """`NCSR.sample` of one LR shape and number of samples as a graph: `sr, first_bad = sampler(lr, temperature, generator)`.

    sr         (B, n, 3, sH, sW) as `NCSR.sample` returns it
    first_bad  (B, n): the number of the decoding step after which a state was first beyond bounds or not finite, at least
               `sampler.sound` where none was; it stays on the device

    Captured at the first call, and anew when an option of the model has changed. The graph begins with the weights as they
    are when it is replayed.

    raises  ValueError for a model on the CPU with graph=True
    """

    def __init__(self, model: NCSR, n: int, *, graph: bool = True) -> None:
        self.model, self.n, self.graph = model, n, graph
        if graph:
            _check_on_gpu(model)
        self.sound = sum(level.steps for level in model.levels) + 1
        self._captured: tuple[object, _Captured] | None = None

    @torch.no_grad()
    def __call__(self, lr: Tensor, temperature: float = 0.9, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        padded = self.model.padded(lr)
        shapes = self.model.latent_shapes(*lr.shape[2:])
        latents = draw_latents(shapes, lr.shape[0], self.n, temperature, lr, generator)
        key = lr.shape, self.model.options
        if not self.graph:
            images, first_bad = self._run(padded, *latents)
        else:
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


def _check_on_gpu(model: NCSR) -> None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a model on a GPU, not on {device}; graph=False runs the same without one")


def _check_capturable(optimizer: torch.optim.Optimizer | None) -> None:
    for group in optimizer.param_groups if optimizer is not None else ():
        if not group.get("capturable") or not isinstance(group["lr"], Tensor):
            raise ValueError(
                "the optimizer must be capturable, with its learning rate in a tensor, so that a graph can hold it: "
                "use ncsr_fast.graphs.adam(model, lr)"
            )
