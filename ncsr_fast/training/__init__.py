"""Training of the encoder by an L1 loss, then of the flow by its likelihood."""

from ncsr_fast.training.lock import RunInUse
from ncsr_fast.training.loop import TrainingDiverged, TrainingOutOfMemory, train
from ncsr_fast.training.processes import OtherProcessFailed, TrainingStopped
from ncsr_fast.training.settings import TrainSettings

__all__ = [
    "OtherProcessFailed",
    "RunInUse",
    "TrainSettings",
    "TrainingDiverged",
    "TrainingOutOfMemory",
    "TrainingStopped",
    "train",
]
