"""The operators of a conditional flow, as differentiable functions on tensors.

Each takes `(…, *, inverse=False, backend="auto")` and returns `(y, logdet)`: `logdet` (B,) is the
log|det| of the map that was applied, so the inverse returns its negative; it is float32, or float64
for float64 input. `inverse_logdet` is the linear algebra of their 1×1 convolutions. `backends()` tells which
implementations there are and why the others are not.
"""

from ncsr_fast.ops._backends import Backend, BackendUnavailable, backends, resolve_backend
from ncsr_fast.ops.actnorm_invconv import actnorm_invconv
from ncsr_fast.ops.affine_coupling import affine_coupling
from ncsr_fast.ops.affine_injector import affine_injector
from ncsr_fast.ops.flow_step import flow_step
from ncsr_fast.ops.gaussian_split import gaussian_split
from ncsr_fast.ops.inverse_logdet import inverse_logdet

OPERATORS = ("actnorm_invconv", "affine_injector", "affine_coupling", "gaussian_split", "flow_step")

__all__ = [
    "OPERATORS",
    "Backend",
    "BackendUnavailable",
    "actnorm_invconv",
    "affine_coupling",
    "affine_injector",
    "backends",
    "flow_step",
    "gaussian_split",
    "inverse_logdet",
    "resolve_backend",
]
