"""A coupling with its network, and the maps of single pixels behind it: as one function of a backend, or composed of others.

encoding    y = injector(mix · coupling(x) + offset)
decoding    y = mix · injector⁻¹(coupling⁻¹(x)) + offset
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ncsr_fast.ops.backend import kernels
from ncsr_fast.ops.protocol import Kernels

if TYPE_CHECKING:
    from ncsr_fast.ops.recorded import RecordedKernels

Coupled = Callable[..., tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]]


class Mixing(NamedTuple):
    """The map of a pixel behind a coupling and the injector fused to it; a mix of None: neither."""

    mix: Tensor | None = None  # (C, C)
    offset: Tensor | None = None  # (C,)
    injector: Tensor | None = None  # (B, 2C, H, W), shift and raw scale interleaved; None: without


class Step(NamedTuple):
    """The result of a coupled step.

    Args:
        y: State (B, C, H, W).
        logdets: Parts of the log|det|, (B,) or shares of tiles (B, tiles), for `total`.
        peak: The largest magnitude of y, NaN where it holds one, (B,) or of tiles (B, tiles), for `peaks`; None: not wanted.
        output: Of the network; None: not wanted.
    """

    y: Tensor
    logdets: tuple[Tensor, ...]
    peak: Tensor | None
    output: Tensor | None


def coupled_step(backend: str, network_backend: str, recorded: bool) -> Coupled:
    """`Kernels.step_network_coupled` for maps and networks of resolved backends: composed of both, where they are not one.

    Args:
        backend: Of the maps.
        network_backend: Of the networks.
        recorded: Of operators, for autograd.
    """
    if recorded:
        from ncsr_fast.ops.recorded import RecordedKernels  # whose operators need the reference, which is made here

        return partial(composed, RecordedKernels(backend), RecordedKernels(network_backend))
    if backend == network_backend:
        return kernels(backend).step_network_coupled
    return partial(composed, kernels(backend), kernels(network_backend))


def composed_of(backend: str) -> Coupled:
    """`Kernels.step_network_coupled` of a backend that has no kernel of it: composed of its other functions."""

    def step_network_coupled(
        x: Tensor,
        pre: Tensor,
        w1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
        mix: Tensor | None,
        offset: Tensor | None,
        injector: Tensor | None,
        eps: float,
        inverse: bool,
        *,
        tf32: bool = False,
        packed: Sequence[Tensor] = (),
        watched: bool = False,
        with_output: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """`Step`: a coupling whose network reads the first channels of x, and the mix and injector behind it.

        Args:
            x: (B, C, H, W).
            pre: (B, hidden, H, W), of the network, whose weights `step_network_forward` describes.
            w1: (hidden, C - changed, 3, 3).
            w2: (hidden, hidden, 1, 1).
            b2: (hidden,).
            w3: (2·changed, hidden, 3, 3).
            b3: (2·changed,).
            mix: (C, C), or None: the coupling alone.
            offset: (C,), or None with it.
            injector: (B, 2C, H, W) or None: of the affine behind the mix when encoding, ahead of it for the inverse.
            eps: Lower bound of the scales.
            inverse: All affines are inverse maps.
            tf32: Whether a GPU may round float32 operands of the network to TF32.
            packed: As `step_network_forward` has it.
            watched: The peak of y is wanted.
            with_output: The output of the network is wanted.
        """
        tensors, own = (x, pre, w1, w2, b2, w3, b3, mix, offset, injector), kernels(backend)
        return composed(own, own, *tensors, eps, inverse, tf32=tf32, watched=watched, with_output=with_output)

    return step_network_coupled


def composed(
    maps: Kernels | RecordedKernels,
    networks: Kernels | RecordedKernels,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    mix: Tensor | None,
    offset: Tensor | None,
    injector: Tensor | None,
    eps: float,
    inverse: bool,
    *,
    tf32: bool = False,
    packed: Sequence[Tensor] = (),
    watched: bool = False,
    with_output: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """`Kernels.step_network_coupled` by the functions of a backend for the maps, and of one for the network."""
    pass_through = x.shape[1] - b3.shape[0] // 2
    h = networks.step_network_forward(x[:, :pass_through], pre, w1, w2, b2, w3, b3, tf32=tf32, packed=packed)
    step = mapped(maps, x, h, pass_through, Mixing(mix, offset, injector), eps, inverse, watched)
    return step._replace(output=h if with_output else None)


def mapped(
    maps: Kernels | RecordedKernels,
    x: Tensor,
    h: Tensor | None,
    pass_through: int,
    mixing: Mixing,
    eps: float,
    inverse: bool,
    watched: bool,
) -> Step:
    """The affine map of h, the known output of a network, and the mix behind it; either may be None."""
    logdets = []
    if h is not None and (inverse or mixing.mix is None):
        x, logdet = maps.affine_forward(x, h, pass_through, eps, inverse)
        logdets.append(logdet)
    if mixing.mix is not None and mixing.offset is not None:
        before, after = (mixing.injector, None) if inverse else (h, mixing.injector)
        x, logdet = maps.flow_step_forward(x, mixing.mix, mixing.offset, before, after, eps, inverse)
        logdets.append(logdet)
    return Step(x, tuple(logdets), largest(x) if watched else None, None)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude (B,), NaN where there is one."""
    return x.abs().amax(dim=(1, 2, 3))


def total(logdets: Sequence[Tensor]) -> Tensor:
    """The log|det| (B,) of all parts; of shares of tiles summed in float64."""
    if all(part.dim() == 1 for part in logdets):
        return torch.stack([*logdets]).sum(dim=0)
    shares = torch.cat([part.view(len(part), -1) for part in logdets], dim=1)
    return shares.sum(dim=1, dtype=torch.float64).to(shares.dtype)


def peaks(found: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitudes (B,) of every state."""
    if len({peak.shape for peak in found}) == 1 and found[0].dim() == 2:
        return [*torch.stack([*found]).amax(dim=2)]
    return [peak if peak.dim() == 1 else peak.amax(dim=1) for peak in found]
