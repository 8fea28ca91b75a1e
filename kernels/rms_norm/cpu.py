"""The native root-mean-square norm."""

from __future__ import annotations

import torch

from qserve.kernels.native import extension


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    weight_offset: float,
    out: torch.Tensor,
) -> None:
    """Writes the norm of ``x``, or of ``residual + x`` which replaces ``residual``, to ``out``."""
    extension().rms_norm(
        *norm_operands(x, weight, eps, residual), weight_offset, out.data_ptr(), out.stride()[0]
    )


def norm_operands(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[float, ...]:
    """What every native norm is told first. Raises ``TypeError`` for a weight that is not
    float32."""
    if weight.dtype is not torch.float32:
        raise TypeError(f"weight is {weight.dtype}, expected float32 on a CPU")
    return (
        x.data_ptr(),
        x.stride()[0],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride()[0],
        weight.data_ptr(),
        eps,
        x.shape[0],
        x.shape[1],
    )
