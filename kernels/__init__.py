"""Triton kernels of the operators: host functions on checked tensors, without autograd.

Arithmetic is float32, except in `inverse_logdet` and in the products of convolutions.
"""

from ncsr_fast.kernels._common import KernelFailure, launched
from ncsr_fast.kernels.affine import affine_backward, affine_forward
from ncsr_fast.kernels.conv3x3 import conv3x3_backward, conv3x3_forward, conv3x3_weights
from ncsr_fast.kernels.flow_step import flow_step_backward, flow_step_forward
from ncsr_fast.kernels.gaussian_split import gaussian_split_backward, gaussian_split_forward
from ncsr_fast.kernels.inverse_logdet import inverse_logdet
from ncsr_fast.kernels.step_network import step_network_forward, step_network_layers

__all__ = [
    "KernelFailure",
    "affine_backward",
    "affine_forward",
    "conv3x3_backward",
    "conv3x3_forward",
    "conv3x3_weights",
    "flow_step_backward",
    "flow_step_forward",
    "gaussian_split_backward",
    "gaussian_split_forward",
    "inverse_logdet",
    "launched",
    "step_network_forward",
    "step_network_layers",
]
