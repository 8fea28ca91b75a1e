"""Root-mean-square norm of every head on its own: Qwen 3's norm of queries and keys."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.head_norm import cpu, reference
from qserve.kernels.rows import check_output, check_rows

__all__ = ["head_norm"]


def head_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[m, h, d] = x[m, h, d] / sqrt(mean_d(x[m, h, d] ** 2) + eps) * (weight_offset +
    weight[d])``

    x: ``[M, H * D]`` with contiguous rows that may lie apart (a slice of qkv), the heads side by
    side. weight: ``[D]``, float32 on a CPU. out: of the shape of ``x``, written and returned; may
    be ``x``. Raises ``ValueError`` for shapes and ``TypeError`` for dtypes that do not fit.
    """
    width = x.shape[-1]
    check_rows("x", x, width)
    if weight.dim() != 1 or not weight.is_contiguous() or width % weight.shape[0]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected the width of a head, of which "
            f"{width} is a multiple"
        )
    out = check_output(x, width, out)
    backend = choose("head_norm", x.device).backend
    if backend is Backend.CPU:
        cpu.head_norm(x, weight, eps, weight_offset, out)
    elif backend is Backend.TRITON:
        load_kernel("head_norm").head_norm(x, weight, eps, weight_offset, out)
    else:
        reference.head_norm(x, weight, eps, weight_offset, out)
    return out
