"""The list, in its order: right or wrong first, then what a user waits for, then what explains it."""

from __future__ import annotations

from .capture import capture_loader, capture_sampler, capture_step
from .checks import engine, kernels
from .driver import Item
from .linear_algebra import linear_algebra, linear_algebra_captured
from .models import published, sampling, sampling_div2k, sampling_profile, training, training_profile, training_variants
from .programs import tests, trainer
from .tables import ceilings, convolutions, operators

ITEMS = [
    Item("ceilings", ceilings, 12),
    Item("kernels", kernels, 30),
    Item("engine", engine, 30),
    Item("linear-algebra", linear_algebra, 12),
    Item("linear-algebra-captured", linear_algebra_captured, 8),
    Item("capture-step", capture_step, 20),
    Item("capture-sampler", capture_sampler, 15),
    Item("capture-loader", capture_loader, 12),
    Item("training", training, 40),
    Item("training-profile", training_profile, 20),
    Item("training-variants", training_variants, 25),
    Item("sampling", sampling, 15),
    Item("sampling-div2k", sampling_div2k, 30),
    Item("sampling-profile", sampling_profile, 12),
    Item("published", published, 50),
    Item("convolutions", convolutions, 30),
    Item("operators", operators, 45),
    Item("tests", tests, 60),
    Item("trainer", trainer, 20),
]
