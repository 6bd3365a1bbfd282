"""The model of a run, in float32 whatever PyTorch's default dtype is."""

from __future__ import annotations

import torch

from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.model import NCSR
from ncsr_fast.training.settings import TrainSettings


def random_model(settings: TrainSettings) -> NCSR:
    """A float32 model of the run's architecture, its weights drawn from PyTorch's default generator."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # the dtype of new parameters
    try:
        return NCSR(settings.model, precision=settings.precision, checkpoint=settings.checkpoint)
    finally:
        torch.set_default_dtype(before)


def first_model(settings: TrainSettings) -> NCSR:
    """The initial model of a run: random weights given by the seed, replaced by `start_from` and `encoder_weights`.

    Raises:
        FileNotFoundError, CheckpointError: One of the two does not exist, cannot be read, or has another architecture.
    """
    torch.manual_seed(settings.seed)
    model = random_model(settings)
    if settings.start_from is not None:
        model.load_published(NCSR.from_pretrained(settings.start_from).published_state_dict())
    if settings.encoder_weights is not None:
        model.encoder.load_published(RRDB.from_pretrained(settings.encoder_weights).published_state_dict())
    return model
