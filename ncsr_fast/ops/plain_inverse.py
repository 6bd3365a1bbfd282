"""Inverse and log|det| of matrices by PyTorch's LU."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_logdet(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W⁻¹ (N, C, C), log|det W| (N,) and the condition number ‖W‖·‖W⁻¹‖ (N,) in the ∞-norm."""
    inverse, info = torch.linalg.inv_ex(weight)
    condition = torch.linalg.matrix_norm(weight, torch.inf) * torch.linalg.matrix_norm(inverse, torch.inf)
    condition = torch.where(info == 0, condition, torch.inf)  # the inverse of a singular matrix may be anything
    return inverse.contiguous(), torch.linalg.slogdet(weight)[1], condition.detach()  # LAPACK's inverse is column-major
