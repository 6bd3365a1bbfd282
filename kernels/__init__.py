"""Triton kernels of the operators: host functions on checked tensors, float32 arithmetic, no autograd."""

from ncsr_fast.kernels.affine import affine_bwd, affine_fwd
from ncsr_fast.kernels.flow_step import step_bwd, step_fwd
from ncsr_fast.kernels.gaussian_split import gaussian_bwd, gaussian_fwd

__all__ = ["affine_bwd", "affine_fwd", "gaussian_bwd", "gaussian_fwd", "step_bwd", "step_fwd"]
