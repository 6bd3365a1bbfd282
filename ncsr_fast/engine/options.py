"""Options of the engine. They change how a model is evaluated, and its results only by the rounding of the networks."""

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
    """Options that say how a model is evaluated.

    PyTorch's global flags change no precision, with two exceptions: if the flags forbid TF32, backward passes use no TF32
    either; and in a graph of `torch.compile`, convolutions without a kernel follow the flags.

    Args:
        engine: "fused": the engine, which computes what does not depend on the state once, for all steps and all samples;
            "plain": the reference, step by step.
        precision: Precision of the networks (encoder, injectors, couplings): "fp32"; "tf32", equal to "fp32" on a CPU; "bf16".
            The state, the log-dets and the 1×1 convolutions are always float32. A float64 model has float64 networks and needs
            "fp32". "fp16", which float16 autocast asks for, has a narrow range: its gradients need `torch.amp.GradScaler`.
        checkpoint: True: a level saves its state at every step, and the hidden layers of the networks are recomputed in the
            backward pass. False: the hidden layers are saved too, which takes more memory and less time.
        backend: Backend of the operators (`ncsr_fast.ops`): "auto", "reference", "native" or "triton". With Winograd's
            convolutions, which the native backend has on a CPU, a NaN or an infinity may spread three pixels further.
        samples_at_once: Number of samples of an image that are decoded together; None: as many as fit an eighth of the memory.
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
        """The method by which networks are convolved."""
        backend = "auto" if self.backend == "native" else self.backend
        return ConvolutionMethod(self.precision == "tf32", backend if ablation().winograd else "reference")

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the state and the features."""
        return torch.channels_last if ablation().channels_last else torch.contiguous_format

    def network_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the networks of a model of `dtype`; ValueError for a float64 model in low precision."""
        if dtype == torch.float64 and self.precision != "fp32":
            raise ValueError(f"precision={self.precision!r} is for float32 models; a float64 model needs precision='fp32'")
        return _DTYPES.get(self.precision, dtype)

    def under_autocast(self, like: Tensor) -> EngineOptions:
        """The options for a model with the parameter `like`: under `torch.autocast`, with autocast's precision.

        For a model of another dtype than float32 the options are unchanged.
        """
        precision = _AUTOCAST.get(autocast_dtype(like.device.type)) if like.dtype == torch.float32 else None
        return self if precision is None else replace(self, precision=precision)
