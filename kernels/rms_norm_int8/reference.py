"""The definition of the norm rounded to int8 in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.activations import MAX_CODE
from qserve.kernels.rms_norm import reference


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
    normed = torch.empty(x.shape, device=x.device)
    reference.rms_norm(x, weight, eps, residual, weight_offset, normed)
    largest = normed.abs().amax(1)
    inverse = torch.where(largest > 0, MAX_CODE / largest, 0.0)
    codes.copy_((normed * inverse[:, None]).round().clamp(-MAX_CODE, MAX_CODE))
    scales.copy_(largest / MAX_CODE)
