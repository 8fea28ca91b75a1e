"""The native layer norm."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension
from qserve.kernels.rms_norm.cpu import norm_operands


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes the norm of ``x``, or of ``residual + x`` which replaces ``residual``, to ``out``."""
    if bias is not None and bias.dtype is not torch.float32:
        raise TypeError(f"bias is {bias.dtype}, expected float32 on a CPU")
    extension().layer_norm(
        *norm_operands(x, weight, eps, residual),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride()[0],
    )
