"""What several test files need: small models, images, vectors."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ncsr_fast import NCSR, NCSRConfig

HERE = Path(__file__).parent
VECTORS = HERE / "conformance"
SHARED = HERE.parent.parent / "shared"
exports = pytest.mark.skipif(
    "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters, reason="torch.export of torch 2.4 is not enough"
)


def tiny_config(**changes) -> NCSRConfig:
    """A whole ×4 NCSR, one step a level, small enough for Jacobians."""
    values = dict(
        scale=4, channels=4, growth=2, blocks=2, stacked_blocks=(0, 1), steps=1, transition_steps=1, hidden_channels=4,
        noise_channels=3, noise_steps=(0, 1, 1),
    )  # fmt: skip
    return NCSRConfig(**{**values, **changes})


def randomize(model: torch.nn.Module, seed: int = 0, amount: float = 0.05) -> torch.nn.Module:
    """Move every parameter off its initial value, so that no zero-initialised convolution hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> NCSR:
    torch.manual_seed(seed)
    return randomize(NCSR(tiny_config(**changes)), seed).to(dtype)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random pixels in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude of `expected`, the measure of the conformance README."""
    expected = expected.double()
    return float((value.double() - expected).abs().max() / expected.abs().max())


@contextlib.contextmanager
def no_reading() -> Iterator[None]:
    """Inside, the package reads no values that may be read on a CPU alone: as on a GPU."""
    with contextlib.ExitStack() as stack:
        for module in ("checks", "ops.inverse_logdet", "engine.cache"):
            stack.enter_context(mock.patch.object(sys.modules[f"ncsr_fast.{module}"], "reading_is_free", return_value=False))
        yield


def fresh_process(code: str, folder: Path, **environment: str) -> str:
    """What a fresh Python prints, in a folder away from the checkout, whose package may not be the installed one."""
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


class Watch(TorchDispatchMode):
    """Calls a function with the name and the positional arguments of every call of an ATen or other operator."""

    def __init__(self, call: Callable[[str, tuple], None]) -> None:
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.call(function.name().split(".")[0], args)
        return function(*args, **(kwargs or {}))


@dataclass
class Case:
    """One model case of the conformance vectors."""

    name: str
    meta: dict
    arrays: dict[str, np.ndarray]

    @property
    def config(self) -> NCSRConfig:
        published = self.meta["config"]
        return NCSRConfig(
            scale=published["scale"],
            blocks=published["nb"],
            steps=published["K"],
            stacked_blocks=published["stack_blocks"],
            noise_channels=published["std_channels"] or 0,
            noise_steps=published["noise_steps_per_level"] or (),
        )

    def weights(self) -> dict[str, Tensor]:
        """The published state dict of the case, actnorms at zero."""
        shapes = {name: np.empty(shape, dtype=np.uint8) for name, shape in self.meta["shapes"].items()}
        filled = weights_module().fill(shapes, seed=self.meta["seed"])
        return {name: torch.from_numpy(np.asarray(value)) for name, value in filled.items()}

    def tensor(self, key: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(self.arrays[key].astype(np.float64)).to(dtype)

    def latents(self, prefix: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [
            self.tensor(f"{prefix}_{index}", dtype) for index in range(sum(f"{prefix}_{i}" in self.arrays for i in range(9)))
        ]

    def batch(self, prefix: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
        """hr, lr and noise as the flow sees them."""
        hr, lr = self.tensor(f"{prefix}_hr"), self.tensor(f"{prefix}_lr")
        if self.config.noise_channels == 0:
            return hr.to(dtype), lr.to(dtype), None
        condition = self.tensor(f"{prefix}_noise" if self.config.noise_channels == 3 else f"{prefix}_sigma")
        hr, lr = hr + self.tensor(f"{prefix}_noise"), lr + self.tensor(f"{prefix}_lr_noise")
        return hr.to(dtype), lr.to(dtype), condition.to(dtype)


def vector_file(name: str) -> Path:
    """A conformance file, from the checkout or from where the large ones are kept; skips when it is nowhere."""
    folders = [VECTORS, *map(Path, filter(None, [os.environ.get("NCSR_CONFORMANCE")])), SHARED / "conformance"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is in none of {', '.join(map(str, folders))}; set NCSR_CONFORMANCE")


def shared_file(name: str) -> Path:
    """A file that is kept beside the checkout, or beside the folder NCSR_CONFORMANCE; skips when it is nowhere."""
    folders = [SHARED, *(Path(folder).parent for folder in filter(None, [os.environ.get("NCSR_CONFORMANCE")]))]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is in none of {', '.join(map(str, folders))}")


def load_case(name: str) -> Case:
    with np.load(vector_file(f"{name}.npz")) as arrays:
        return Case(name, json.loads(vector_file(f"{name}.json").read_text()), dict(arrays))


def weights_module(folder: str = "."):
    """weights.py of tests/conformance, or of a folder there."""
    spec = importlib.util.spec_from_file_location("conformance_weights", VECTORS / folder / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_settings(images: Path | str, **changes):
    """Settings of a run of seconds: three steps of the encoder, six of the flow."""
    from ncsr_fast.training import TrainSettings

    values = dict(
        model=tiny_config(), images=(str(images),), crop=32, batch=2, encoder_steps=3, steps=6, encoder_lr=1e-3, lr=1e-3,
        log_every=2, save_every=2, validate_every=3, validation_size=64, seed=7, workers=0, cache_gib=0,
    )  # fmt: skip
    return TrainSettings(**{**values, **changes})


def log_rows(run: Path, timeless: bool = False) -> list[dict]:
    """The lines of a run's log; `timeless` without what depends on how fast it was."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = ("steps_per_s", "images_per_s", "data_wait") if timeless else ()
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def contents(folder: Path) -> dict[str, bytes | None] | None:
    """All that is in a folder, by its path there: the bytes of files, None for folders; None where the folder is not there."""
    if not folder.is_dir():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def as_a_worker(target, *arguments) -> None:
    """Call `target` in a process of its own with one thread, as DataLoader's workers do: a forked process has none of its
    parent's OpenMP threads, and would wait for them for ever."""
    torch.set_num_threads(1)
    target(*arguments)


@contextlib.contextmanager
def full_disk(room: int = 500):
    """Files of this process take `room` bytes and no more: writing beyond them fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_same_weights(first: NCSR, second: NCSR) -> None:
    """Bit for bit."""
    other = second.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.state_dict().items())
