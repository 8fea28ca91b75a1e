"""The norm rounded to int8 in Triton: the kernel of ``rms_norm``, with scales."""

from __future__ import annotations

import torch

from qserve.kernels.rms_norm import kernel


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
    kernel.rms_norm(x, weight, eps, residual, weight_offset, codes, scales)
