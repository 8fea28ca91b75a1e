"""A smooth limit for logits (Gemma 2)."""

from __future__ import annotations

import torch

from qserve.kernels.backend import Backend, choose, load_kernel
from qserve.kernels.rows import check_output, check_rows
from qserve.kernels.soft_cap import cpu, reference

__all__ = ["soft_cap"]


def soft_cap(x: torch.Tensor, cap: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``y = cap * tanh(x / cap)``: hardly changed where small, never beyond ``cap`` (Gemma 2,
    section 2).

    x: ``[M, N]`` with contiguous rows. out: of that shape, written and returned; may be ``x``.
    Raises ``ValueError`` for shapes or a ``cap`` that is not positive, ``TypeError`` for dtypes
    that do not fit.
    """
    width = x.shape[-1]
    check_rows("x", x, width)
    if not cap > 0:
        raise ValueError(f"cap is {cap}: expected a positive number")
    out = check_output(x, width, out)
    backend = choose("soft_cap", x.device).backend
    if backend is Backend.CPU:
        cpu.soft_cap(x, cap, out)
    elif backend is Backend.TRITON:
        load_kernel("soft_cap").soft_cap(x, cap, out)
    else:
        reference.soft_cap(x, cap, out)
    return out
