"""Options of the engine. None of them changes what is computed, but for the rounding of the networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ncsr_fast.autocast import autocast_dtype
from ncsr_fast.engine.ablation import ablation
from ncsr_fast.ops.backend import BACKENDS
from ncsr_fast.ops.conv3x3 import ConvolutionMethod

ENGINES = ("fused", "plain")
PRECISIONS = ("fp32", "tf32", "bf16")  # for training too; EngineOptions says what "fp16" is for
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of the networks of a float32 model
_AUTOCAST: dict[torch.dtype | None, str] = {dtype: precision for precision, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class EngineOptions:
    """How a model is evaluated.

    Args:
        engine: "fused": what does not depend on the state is computed once, for all steps and all samples; "plain": step by
            step, the reference that the other is held to.
        precision: Of the networks (encoder, injectors, couplings): "fp32"; "tf32", the same on a CPU; "bf16". The state, its
            log-determinants and the 1×1 convolutions are float32 in all of them. A float64 model has float64 networks, and
            wants "fp32". "fp16", which float16 autocast asks for, has a narrow range: its gradients need
            `torch.amp.GradScaler`. PyTorch's global flags change none of it, with two exceptions: where they forbid TF32,
            backward passes have none either; and a graph of `torch.compile` convolves as they say, where no kernel does.
        checkpoint: True: a level saves its state at every step and recomputes the hidden layers of the networks in the
            backward pass; False: it saves them too, which takes more memory and less time.
        backend: Of the operators (`ncsr_fast.ops`): "auto", "reference", "native" or "triton". By Winograd's convolutions,
            which the native backend has on a CPU, a NaN or an infinity may reach three pixels further.
        samples_at_once: How many samples of an image are decoded together; None: as many as an eighth of the memory holds.
    """

    engine: str = "fused"
    precision: str = "fp32"
    checkpoint: bool = True
    backend: str = "auto"
    samples_at_once: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("engine", ENGINES), ("precision", (*PRECISIONS, "fp16")), ("backend", ("auto", *BACKENDS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if self.samples_at_once is not None and self.samples_at_once < 1:
            raise ValueError(f"samples_at_once must be at least 1, not {self.samples_at_once!r}")

    @property
    def method(self) -> ConvolutionMethod:
        """How networks are convolved."""
        backend = "auto" if self.backend == "native" else self.backend
        return ConvolutionMethod(self.precision == "tf32", backend if ablation().winograd else "reference")

    @property
    def memory_format(self) -> torch.memory_format:
        """How the state and the features lie."""
        return torch.channels_last if ablation().channels_last else torch.contiguous_format

    def network_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the networks of a model of `dtype`; ValueError for a float64 model with low-precision networks."""
        if dtype == torch.float64 and self.precision != "fp32":
            raise ValueError(f"precision={self.precision!r} is for float32 models; a float64 one needs precision='fp32'")
        return _DTYPES.get(self.precision, dtype)

    def under_autocast(self, like: Tensor) -> EngineOptions:
        """The options for a model whose parameter `like` is: under `torch.autocast`, with the precision it asks for.

        Options of a model of another dtype than float32 stay as they are.
        """
        precision = _AUTOCAST.get(autocast_dtype(like.device.type)) if like.dtype == torch.float32 else None
        return self if precision is None else replace(self, precision=precision)
