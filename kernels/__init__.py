"""Triton kernels of the operators: host functions on checked tensors, no autograd; float32 arithmetic but for matrices."""

from ncsr_fast.kernels.affine import affine_bwd, affine_fwd
from ncsr_fast.kernels.flow_step import step_bwd, step_fwd
from ncsr_fast.kernels.gaussian_split import gaussian_bwd, gaussian_fwd
from ncsr_fast.kernels.inverse_logdet import inverse_logdet

__all__ = ["affine_bwd", "affine_fwd", "gaussian_bwd", "gaussian_fwd", "inverse_logdet", "step_bwd", "step_fwd"]
