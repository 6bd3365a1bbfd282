"""The trial of a recognised network: a copy of it and the replacement of that copy, on a small image."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncsr_fast.autocast import undecorated, without_autocast
from ncsr_fast.compat.served import EngineForward
from ncsr_fast.precision import true_float32

_TOLERANCE = 1e-4  # relative to the largest element: rounding is below 1e-5, a different formula far above
# Size of random changes of parameters, so that zero-initialised layers compute something, and the dtype. Larger changes make
# inverses explode. Published inverses are float32; in it, encodings have too few right digits after SRFlow-DA-D's 36 layers.
_DIRECTIONS = {"encode": (3e-3, torch.float64), "decode": (3e-4, torch.float32)}


class Pair(NamedTuple):
    """A result of the network's own code, and that of its replacement."""

    theirs: Tensor
    ours: Tensor
    inaccuracy: float = 0.0  # of inverting in float32


class Sides:
    """The same calls of a network's own code and of its replacement, neither under the autocast that decorates the former."""

    def __init__(self, replacement: EngineForward) -> None:
        self.module, self.replacement = replacement.module, replacement
        self._own, _ = undecorated(type(replacement.module).forward)

    def own(self, *arguments: Any, **options: Any) -> Any:
        return self._own(self.module, *arguments, **options)

    def both(self, seed: int, make: Callable[[], dict[str, Any]]) -> tuple[Any, Any]:
        """The results of both for the arguments that `make` returns, which a call may change, after the same seed."""
        results = []
        for call in (self.own, self.replacement.undecorated):
            _seed(seed, next(self.module.parameters()).device)
            results.append(call(**make()))
        return results[0], results[1]


@torch.no_grad()
def disagreement(
    net: nn.Module,
    ours: Callable[[nn.Module], EngineForward],
    compared: Callable[[Sides, str, Tensor, torch.Generator], Iterator[Pair]],
) -> str | None:
    """The difference between the results of a copy of `net` and of `ours(copy)` on a small image, in words; None: none.

    A class may have the same structure and compute something else. Neither the network nor a random generator is changed.

    Args:
        net: The network.
        ours: Function that makes the replacement.
        compared: Function of both sides, the direction ("encode", "decode"), a parameter and a generator, that returns the
            pairs to compare. It initialises the actnorms, without which inverses explode.
    """
    for direction, (step, dtype) in _DIRECTIONS.items():
        try:
            trial, generator = copy.deepcopy(net).to(dtype), torch.Generator().manual_seed(0)
            for parameter in trial.parameters():
                parameter.add_(step * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter))
            sides = Sides(ours(trial))
            like = next(trial.parameters())
            with _generators_kept(like.device), true_float32(like), without_autocast(like.device.type):
                pairs = list(compared(sides, direction, like, generator))
        except Exception as error:  # unknown code may raise anything
            return f"it fails for a small image: {type(error).__name__}: {error}"
        if sides.replacement.handed_over:
            return next(iter(sides.replacement.handed_over))
        for theirs, own, inaccuracy in pairs:
            allowed = _TOLERANCE * float(theirs.abs().max()) + 10 * inaccuracy
            if not float((theirs - own).abs().max()) <= allowed:
                return f"it {direction}s to something else than a network of this structure does"
    return None


def random_images(shapes: dict[str, tuple[int, ...]], like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Images in [0, 1) of these shapes, as `like`."""
    return {name: torch.rand(1, *shape, generator=generator, device="cpu").to(like) for name, shape in shapes.items()}


@contextlib.contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """A context after which the random generators are as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


def _seed(seed: int, device: torch.device) -> None:
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
