"""The fast evaluation of a flow: everything that does not depend on the state z is computed once.

The means are hoisting, fused steps, and one gradient per level. The engine works on tensors; the modules that hold the
parameters are in `ncsr_fast.flow`.
"""

from ncsr_fast.engine.options import EngineOptions

__all__ = ["EngineOptions"]
