"""Training: the encoder by L1, then the flow by its likelihood."""

from ncsr_fast.training.loop import TrainingDiverged, train
from ncsr_fast.training.settings import TrainSettings

__all__ = ["TrainSettings", "TrainingDiverged", "train"]
