"""The operators of a conditional flow, as differentiable functions on tensors.

The maps of the flow's state, listed in `OPERATORS`, take `(…, *, inverse=False, backend="auto")` and return `(y, logdet)`.
`logdet` (B,) is the log|det| of the map that was applied, so the inverse returns the negative of the forward log-det. It is
float32, or float64 for float64 input. `conv3x3` and `step_network` compute the networks, `fold` and `inverse_logdet` the linear
algebra of the 1×1 convolutions. `backends()` lists the backends, and says why one is not available.
"""

from ncsr_fast.ops.actnorm_invconv import actnorm_invconv
from ncsr_fast.ops.affine import affine_coupling, affine_injector
from ncsr_fast.ops.backend import Backend, BackendUnavailable, backends, resolve_backend
from ncsr_fast.ops.conv3x3 import conv3x3
from ncsr_fast.ops.flow_step import flow_step
from ncsr_fast.ops.fold import fold
from ncsr_fast.ops.gaussian_split import gaussian_split
from ncsr_fast.ops.inverse_logdet import inverse_logdet
from ncsr_fast.ops.step_network import step_network

OPERATORS = ("actnorm_invconv", "affine_injector", "affine_coupling", "gaussian_split", "flow_step")

__all__ = [
    "OPERATORS",
    "Backend",
    "BackendUnavailable",
    "actnorm_invconv",
    "affine_coupling",
    "affine_injector",
    "backends",
    "conv3x3",
    "flow_step",
    "fold",
    "gaussian_split",
    "inverse_logdet",
    "resolve_backend",
    "step_network",
]
