"""Root-mean-square norm, with the addition to the residual stream before it."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.rms_norm import cpu, reference
from qserve.kernels.rows import check_output, check_rows

__all__ = ["check_norm", "rms_norm"]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[m, h] = r[m, h] / sqrt(mean_h(r[m, h] ** 2) + eps) * (weight_offset + weight[h])`` (Zhang
    and Sennrich 2019)

    x: ``[M, H]`` with contiguous rows. r is ``x``; with a ``residual [M, H]``, x is added to it in
    place and r is the sum. weight: ``[H]``, float32 on a CPU. weight_offset: 1 for Gemma, whose
    weights are stored as their distance from 1. out: ``[M, H]``, written and returned; may be
    ``x``. Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    check_norm(x, weight, residual)
    out = check_output(x, x.shape[1], out)
    backend = choose("rms_norm", x.device).backend
    if backend is Backend.CPU:
        cpu.rms_norm(x, weight, eps, residual, weight_offset, out)
    elif backend is Backend.TRITON:
        load_kernel("rms_norm").rms_norm(x, weight, eps, residual, weight_offset, out)
    else:
        reference.rms_norm(x, weight, eps, residual, weight_offset, out)
    return out


def check_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Raises ``ValueError`` or ``TypeError`` unless the operands of a norm fit each other."""
    width = x.shape[-1]
    check_rows("x", x, width)
    if residual is not None:
        check_output(x, width, residual)
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected contiguous [{width}]")
