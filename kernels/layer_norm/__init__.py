"""Layer norm, with the addition to the residual stream before it."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.layer_norm import cpu, reference
from qserve.kernels.rms_norm import check_norm
from qserve.kernels.rows import check_output

__all__ = ["layer_norm"]


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[m, h] = (r[m, h] - mean(r[m])) / sqrt(var(r[m]) + eps) * weight[h] + bias[h]`` (Ba, Kiros
    and Hinton 2016); ``var`` is the mean of the squared distances from the mean.

    x: ``[M, H]`` with contiguous rows. r is ``x``; with a ``residual [M, H]``, x is added to it in
    place and r is the sum. weight, bias: ``[H]``, float32 on a CPU; no bias is a bias of zeros.
    out: ``[M, H]``, written and returned; may be ``x``. Raises ``ValueError`` for shapes and
    ``TypeError`` for dtypes that do not fit.
    """
    check_norm(x, weight, residual)
    if bias is not None and (bias.shape != weight.shape or not bias.is_contiguous()):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected contiguous {tuple(weight.shape)}"
        )
    out = check_output(x, x.shape[1], out)
    backend = choose("layer_norm", x.device).backend
    if backend is Backend.CPU:
        cpu.layer_norm(x, weight, bias, eps, residual, out)
    elif backend is Backend.TRITON:
        load_kernel("layer_norm").layer_norm(x, weight, bias, eps, residual, out)
    else:
        reference.layer_norm(x, weight, bias, eps, residual, out)
    return out
