"""Triton kernels of the operators: host functions on checked tensors, without autograd.

Arithmetic is float32, except in `inverse_logdet` and in the products of convolutions.
"""

from ncsr_fast.kernels._common import KernelFailure, launched
from ncsr_fast.kernels._flow_step_mix import flow_step_mix_backward
from ncsr_fast.kernels._network_weight import step_network_weights_backward
from ncsr_fast.kernels.affine import affine_backward, affine_forward
from ncsr_fast.kernels.conv3x3 import conv3x3_backward, conv3x3_forward, conv3x3_weights
from ncsr_fast.kernels.coupled_step import step_network_coupled
from ncsr_fast.kernels.dense_blocks import dense_blocks_backward, dense_blocks_forward
from ncsr_fast.kernels.flow_step import flow_step_backward, flow_step_forward
from ncsr_fast.kernels.fold_filters import fold_filters_backward, fold_filters_forward
from ncsr_fast.kernels.gaussian_split import gaussian_split_backward, gaussian_split_forward
from ncsr_fast.kernels.hoisting import hoisted_backward, hoisted_forward
from ncsr_fast.kernels.inverse_logdet import inverse_logdet
from ncsr_fast.kernels.step_network import step_network_forward, step_network_layers, step_network_tails, step_network_weights
from ncsr_fast.kernels.step_network_backward import step_network_backward

__all__ = [
    "KernelFailure",
    "affine_backward",
    "affine_forward",
    "conv3x3_backward",
    "conv3x3_forward",
    "conv3x3_weights",
    "dense_blocks_backward",
    "dense_blocks_forward",
    "step_network_coupled",
    "flow_step_backward",
    "flow_step_forward",
    "flow_step_mix_backward",
    "fold_filters_backward",
    "fold_filters_forward",
    "gaussian_split_backward",
    "gaussian_split_forward",
    "hoisted_backward",
    "hoisted_forward",
    "inverse_logdet",
    "launched",
    "step_network_backward",
    "step_network_forward",
    "step_network_layers",
    "step_network_tails",
    "step_network_weights",
    "step_network_weights_backward",
]
