"""The native norm rounded to int8."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension
from qserve.kernels.rms_norm.cpu import norm_operands


def rms_norm_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    weight_offset: float,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Writes the rounded norm of ``x``, or of ``residual + x`` which replaces ``residual``."""
    extension().rms_norm_int8(
        *norm_operands(x, weight, eps, residual), weight_offset, codes.data_ptr(), scales.data_ptr()
    )
