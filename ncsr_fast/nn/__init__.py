"""The model: its modules, its parameters, and the published layout of them."""

from ncsr_fast.files import CheckpointError
from ncsr_fast.nn.encoder import RRDB
from ncsr_fast.nn.ncsr import NCSR, Encoded

__all__ = ["NCSR", "RRDB", "CheckpointError", "Encoded"]
