"""Fast, exact conditional normalizing flows for super-resolution: NCSR, SRFlow and their operators.

    from ncsr_fast import NCSR
    model = NCSR.from_pretrained("ncsr-compact-x4")
    sr = model.sample(lr, n=10, temperature=0.8)   # (B, 10, 3, 4H, 4W)

Importing the package needs torch alone.
"""

import importlib

from ncsr_fast import ops
from ncsr_fast.config import NCSRConfig
from ncsr_fast.encoder.rrdb import RRDB
from ncsr_fast.family import from_published
from ncsr_fast.files import CheckpointError
from ncsr_fast.model import NCSR

__version__ = "0.1.0"
__all__ = [
    "NCSR",
    "NCSRConfig",
    "RRDB",
    "CheckpointError",
    "__version__",
    "accelerate",
    "data",
    "from_published",
    "graphs",
    "metrics",
    "ops",
    "restore",
    "training",
]

_LAZY = ("data", "graphs", "metrics", "training")  # modules that need more than torch, or are not always needed
_COMPAT = ("accelerate", "restore")


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"ncsr_fast.{name}")
    if name in _COMPAT:
        return getattr(importlib.import_module("ncsr_fast.compat"), name)
    raise AttributeError(f"module 'ncsr_fast' has no attribute {name!r}")
