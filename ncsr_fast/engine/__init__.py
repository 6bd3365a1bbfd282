"""What makes the model fast: everything that does not depend on the state z is computed once (hoisting, fused
steps, one gradient a level). It works on tensors; the modules that hold the parameters are in `ncsr_fast.flow`.
"""

from ncsr_fast.engine.options import EngineOptions

__all__ = ["EngineOptions"]
