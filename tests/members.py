"""The published systems that vectors were recorded of: their models, each loaded once for the tests that follow one another."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

import numpy as np
import torch
from support import Case, load_case, vector_file, weights_module
from torch import Tensor

import ncsr_fast
from ncsr_fast import NCSR

SMALL = ["ncsr_x4_small", "ncsr_x4_std_small", "ncsr_x8_small", "srflow_x4_small"]
FULL = "ncsr_x4_full"
DEEP = ["srflow_da_x4_small", "srflow_da_r_x4_small", "srflow_da_d_x4_small", "srflow_da_s_x4_small", "srflow_da_x8_small"]
LOW_LIGHT = ["llflow_smallnet_small", "llflow_small"]
FAMILY = [*DEEP, "ctflow_small", *LOW_LIGHT, "fs_ncsr_x4_small"]
MEMBERS = [*SMALL, FULL, *FAMILY]
# a published model, and networks and encoders of both other kinds, at the least cost
FAST = ("ncsr_x4_small", "srflow_da_r_x4_small", "ctflow_small")


class Member(Case):
    """A model of NCSR's program, or of SRFlow's."""

    def model(self, weights: dict[str, Tensor], dtype: torch.dtype) -> NCSR:
        """The model of the case with these weights."""
        model = NCSR(self.config).to(dtype)
        model.load_published(weights)
        return model

    def probes(self, shapes: dict[str, Iterable[int]]) -> list[Tensor]:
        """Random numbers that recorded gradients were multiplied by, by the names of their tensors."""
        draw, seed = weights_module().tensor_for, self.meta["seed"]
        return [torch.from_numpy(draw("probe:" + key, tuple(shape), seed)) for key, shape in shapes.items()]

    def condition(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The LR images of the sample in the vectors."""
        return self.tensor("eval_clean_lr" if "eval_clean_lr" in self.arrays else "eval_lr", dtype)


class FamilyMember(Member):
    """A model of another program, whose images in the vectors are what the flow sees."""

    def weights(self) -> dict[str, Tensor]:
        filled = weights_module("family").fill(self.meta["shapes"], self.meta["seed"], self.meta["gains"])
        return {name: torch.from_numpy(np.asarray(value)) for name, value in filled.items()}

    def batch(self, prefix: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        names = [f"{prefix}_hr", f"{prefix}_lr", *([f"{prefix}_noise"] if f"{prefix}_noise" in self.arrays else [])]
        return tuple(self.tensor(name, dtype) for name in names)

    def model(self, weights: dict[str, Tensor], dtype: torch.dtype) -> NCSR:
        return ncsr_fast.from_published(self.meta["options"], weights).to(dtype)

    def probes(self, shapes: dict[str, Iterable[int]]) -> list[Tensor]:
        draw, seed = weights_module("family").normal, self.meta["seed"]
        return [torch.from_numpy(draw("probe:" + key, shape, seed)) for key, shape in shapes.items()]


@functools.lru_cache(maxsize=1)
def case(name: str) -> Member:
    if name in FAMILY:
        with np.load(vector_file(f"family/{name}.npz")) as arrays:
            return FamilyMember(name, json.loads(vector_file(f"family/{name}.json").read_text()), dict(arrays))
    found = load_case(name)
    return Member(found.name, found.meta, found.arrays)


@functools.lru_cache(maxsize=1)
def published(name: str) -> dict[str, Tensor]:
    """The published state dict of a case, actnorms from the vectors."""
    vectors, weights = case(name), case(name).weights()
    for key, value in zip(vectors.meta["actnorm_names"], vectors.tensor("actnorm").split(vectors.meta["actnorm_sizes"])):
        weights[key] = value.reshape(weights[key].shape)
    return weights


@functools.lru_cache(maxsize=1)
def loaded(name: str, dtype: torch.dtype) -> NCSR:
    """The model of a case, shared: a test changes nothing of it but gradients and options."""
    return case(name).model(published(name), dtype)
