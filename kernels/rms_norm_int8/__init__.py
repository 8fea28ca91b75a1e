"""Root-mean-square norm rounded to int8, ready for a product with int8 activations."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.rms_norm import check_norm
from qserve.kernels.rms_norm_int8 import cpu, reference

__all__ = ["rms_norm_int8"]


def rms_norm_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 ``[M, H]`` and scales float32 ``[M]`` of ``y = rms_norm(x, weight, eps, ...)``.

    With ``top[m] = max(abs(y[m]))``: ``scales[m] = top[m] / 127``, ``codes[m, h] = rint(y[m, h] *
    (127 / top[m]))`` in -127..127; a row of zeros has scale 0. Operands, and what is raised, as in
    ``rms_norm``.
    """
    check_norm(x, weight, residual)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], device=x.device)
    backend = choose("rms_norm_int8", x.device).backend
    run = reference.rms_norm_int8
    if backend is Backend.CPU:
        run = cpu.rms_norm_int8
    elif backend is Backend.TRITON:
        run = load_kernel("rms_norm_int8").rms_norm_int8
    run(x, weight, eps, residual, weight_offset, codes, scales)
    return codes, scales
